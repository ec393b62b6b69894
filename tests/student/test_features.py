"""Feature extractors by name: values, shapes, devices' dtype, what torch-fidelity is called with, refusals."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from ard.data import digits
from ard.evaluation import digit_classifier as classifiers
from ard.evaluation.features import load_features

INCEPTION_MODULE = "torch_fidelity.feature_extractor_inceptionv3"


def test_pooled_features_are_block_means():
    images = torch.randn(3, 2, 16, 24)
    features = load_features("pooled").extract(images)
    expected = images.view(3, 2, 8, 2, 8, 3).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(features, expected)
    assert features.dtype == torch.float32 and features.shape == (3, 128)


def test_pooled_features_of_small_images_are_the_images():
    images = torch.randn(3, 4, 5, 8)
    assert torch.equal(load_features("pooled").extract(images), images.flatten(1))


def test_digit_features_come_from_a_classifier_that_works():
    features = load_features("digits")
    data = digits.load()
    hidden = features.extract(data.held_out_images)
    assert (
        hidden.shape == (len(data.held_out_labels), classifiers.DigitClassifier.FEATURES) and not hidden.requires_grad
    )
    accuracy = (features.classify(hidden).argmax(dim=1) == data.held_out_labels).double().mean()
    assert accuracy > 0.95 and classifiers.train_classifier(data, classifiers.ClassifierConfig())[1] == accuracy
    with pytest.raises(ValueError, match=r"features 'digits': images are .*\(n, 3, 8, 8\); expected .*\(n, 1, 8, 8\)"):
        features.extract(torch.zeros(2, 3, 8, 8))


class FakeInception(torch.nn.Module):
    """Takes what torch-fidelity's extractor takes: names and a path, then uint8 (n, 3, h, w); gives a tuple."""

    made = ()

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        FakeInception.made = (name, features_list, feature_extractor_weights_path)

    def forward(self, images):
        assert images.dtype == torch.uint8 and not self.training
        return (images.flatten(2).double().mean(dim=2),)


@pytest.fixture
def fake_inception(monkeypatch):
    module = types.ModuleType(INCEPTION_MODULE)
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, INCEPTION_MODULE, module)


def test_inception_gets_uint8_and_the_weights_file(fake_inception, tmp_path):
    weights = tmp_path / "inception.pth"
    weights.touch()
    features = load_features("inception", weights=weights)
    assert FakeInception.made == ("inception-v3-compat", ["2048"], str(weights))
    levels = torch.tensor([-2.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    hidden = features.extract(levels)
    assert hidden.tolist() == [[0.0, 127.0, 255.0]] * 2 and hidden.dtype == torch.float32
    load_features("inception")
    assert FakeInception.made[2] is None
    with pytest.raises(ValueError, match=r"images are .*\(n, 4, 8, 8\); expected floating point \(n, 3, any, any\)"):
        features.extract(torch.zeros(1, 4, 8, 8))


def test_inception_needs_torch_fidelity_and_its_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"'inception' needs torch-fidelity.*pip install torch-fidelity"):
        load_features("inception")
    with pytest.raises(ValueError, match=r"weights is '.*absent.pth'; expected a file"):
        load_features("inception", weights=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"weights is .*; expected None for 'pooled'"):
        load_features("pooled", weights=tmp_path)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "constant = 3\n"
        "def channel_means(images):\n    return images.mean(dim=(2, 3))\n"
        "def wrong(images):\n    return images\n"
        "def nothing(images):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_features"
    sys.modules.pop("my_features", None)


def test_a_users_function(user_module):
    features = load_features(f"{user_module}:channel_means")
    images = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    hidden = features.extract(images)
    assert features.name == "my_features:channel_means" and features.classify is None
    assert hidden.dtype == torch.float32 and not hidden.requires_grad
    torch.testing.assert_close(hidden, images.detach().float().mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "function, message",
    [
        ("wrong", r"got \(3, 2, 4, 4\) for 3 images; expected a tensor \(n, F\)"),
        ("nothing", r"got NoneType for 3 images; expected a tensor \(n, F\)"),
    ],
)
def test_a_users_function_must_give_features(user_module, function, message):
    with pytest.raises(ValueError, match=message):
        load_features(f"{user_module}:{function}").extract(torch.zeros(3, 2, 4, 4))


def test_a_users_function_must_exist(user_module):
    for name in ("absent", "constant"):
        with pytest.raises(ValueError, match=rf"my_features has no function '{name}'"):
            load_features(f"{user_module}:{name}")
    with pytest.raises(ImportError, match=r"'no_such_module:f' does not import .*PYTHONPATH"):
        load_features("no_such_module:f")
    with pytest.raises(ValueError, match=r"name is 'module:'; expected package\.module:function"):
        load_features("module:")


def test_unknown_names_are_answered_with_the_nearest_first():
    with pytest.raises(ValueError, match=r"name is 'inceptoin'; expected one of inception, .*digits"):
        load_features("inceptoin")
    with pytest.raises(ValueError, match=r"name is 'pool'; expected one of pooled, .*package\.module:function"):
        load_features("pool")


def test_images_must_be_four_dimensional_floats():
    for images in (torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"features 'pooled': images are .*; expected floating point"):
            load_features("pooled").extract(images)


class StandInDino(torch.nn.Module):
    """Class tokens: the mean of each channel."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))


def normalized_grey(level: float) -> list[float]:
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return [(level / 255 - mean) / deviation for mean, deviation in zip(means, deviations, strict=True)]


def test_dinov2_as_torchscript_gets_normalized_pixels(tmp_path):
    torch.jit.script(StandInDino()).save(tmp_path / "dino.pt")
    features = load_features("dinov2", weights=tmp_path / "dino.pt")
    hidden = features.extract(torch.zeros(2, 3, 8, 8))  # grey: 127 of 255
    torch.testing.assert_close(hidden, torch.tensor([normalized_grey(127.0)] * 2), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"images are .*\(n, 1, 8, 8\); expected floating point \(n, 3, any, any\)"):
        features.extract(torch.zeros(1, 1, 8, 8))
    (tmp_path / "none.pt").write_bytes(b"no script")
    with pytest.raises(ValueError, match=r"weights .*none\.pt are no TorchScript"):
        load_features("dinov2", weights=tmp_path / "none.pt")
    for weights in (None, tmp_path / "absent.pt"):
        with pytest.raises(ValueError, match=r"expected a TorchScript file or a folder of transformers, of a DINOv2"):
            load_features("dinov2", weights=weights)


def test_dinov2_from_a_folder_of_transformers(tmp_path, monkeypatch):
    """The class token, of a stand-in for the library; a real one was tried by hand, see the README."""
    seen = {}

    class AutoModel:
        @staticmethod
        def from_pretrained(folder, **options):
            seen.update(options, folder=folder)

            class Network(torch.nn.Module):
                def forward(self, pixel_values):
                    tokens = pixel_values.flatten(2).transpose(1, 2)
                    return types.SimpleNamespace(last_hidden_state=tokens)

            return Network()

    module = types.ModuleType("transformers")
    module.AutoModel = AutoModel
    monkeypatch.setitem(sys.modules, "transformers", module)
    features = load_features("dinov2", weights=tmp_path)
    assert seen == {"folder": str(tmp_path), "local_files_only": True, "use_safetensors": True}
    torch.testing.assert_close(features.extract(torch.zeros(1, 3, 9, 7))[0], torch.tensor(normalized_grey(127.0)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"a folder for 'dinov2' needs transformers"):
        load_features("dinov2", weights=tmp_path)
