"""A student as a `diffusers.DiffusionPipeline`: a folder of it, a model with a VAE and a text encoder, and images.

    model_index.json        the components
    transformer/            `ARDTransformer`: the student's config, settings and weights
    vae/                    `AutoencoderKL`, where the student makes latents
    text_encoder/           `T5EncoderModel`, and tokenizer/, where it takes text

Shape suffixes: B images (of all prompts), c h w of a state, N text tokens of E channels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ard.common.settings import build
from ard.config.recipe import plain
from ard.models.config import Condition
from ard.models.families import config_class
from ard.models.student import ARDStudent
from ard.storage.files import atomic_folder, shown, write_json
from ard.weights.diffusers_format import INDEX_NAME, model_folder, weight_files
from ard.weights.names import listing
from ard.weights.text_encoder import TextEncoderFiles, encode_texts, token_counts
from ard.weights.vae import UNREAD, LatentCodec

try:
    import diffusers
    from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import logging
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        f"ard.pipeline needs diffusers, and transformers for text ({error}): pip install 'ard-kernels[diffusers,text]'"
    ) from error

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
IMAGE_CHANNELS = (1, 3)  # of states that are images, without a VAE
_SETTINGS = ("steps", "history_layers", "window", "sink", "timesteps")  # of `ARDStudent.settings`


class ARDTransformer(ModelMixin, ConfigMixin):
    """An `ARDStudent` as diffusers saves and loads models.

    model: the config of its family, as a mapping. settings: `ARDStudent.settings`.
    Raises ValueError for mappings that are neither.
    """

    @register_to_config
    def __init__(self, model: dict, settings: dict):
        super().__init__()
        if not isinstance(settings, dict) or sorted(settings) != sorted(_SETTINGS):
            found = (listing(list(settings)) or "nothing") if isinstance(settings, dict) else type(settings).__name__
            raise ValueError(f"ARDTransformer: settings are {found}; expected {_SETTINGS}")
        if not isinstance(model, dict):
            raise ValueError(f"ARDTransformer: model is a {type(model).__name__}; expected a mapping of sizes")
        self.student = ARDStudent(build(config_class(model), model, "model"), **settings)

    @classmethod
    def of(cls, student: ARDStudent) -> ARDTransformer:
        """One that holds this student itself."""
        with torch.device("meta"):
            transformer = cls(model=plain(student.config), settings=plain(student.settings))
        transformer.student = student
        return transformer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> Any:
        """As `ModelMixin`, but weights that are missing or unexpected, of which it only warns, raise ValueError."""
        wanted = options.pop("output_loading_info", False)
        model, loading = super().from_pretrained(
            pretrained_model_name_or_path, **{"use_safetensors": True, **options}, output_loading_info=True
        )
        if wrong := {kind: names for kind, names in loading.items() if names}:
            raise ValueError(f"ARDTransformer: {pretrained_model_name_or_path} does not fit its config: {wrong}")
        model.student.check_buffers()
        return (model, loading) if wanted else model

    def forward(
        self, noise_Bchw: Tensor, *conditions: Tensor, on_step: Callable[[int, Tensor], Tensor | None] | None = None
    ) -> Tensor:
        """All predictions (B, S, c, h, w), as `ARDStudent.sample` gives them."""
        return self.student.sample(noise_Bchw, *conditions, on_step=on_step)


class ARDPipeline(DiffusionPipeline):
    """Images of a prompt or of a class in the student's few steps.

    transformer: `ARDTransformer`. vae: the `AutoencoderKL` of its latents; a student of 1 or 3 channels without one
    makes images itself. text_encoder, tokenizer: a `T5EncoderModel` and its tokenizer, for a student that takes text;
    without them prompts come as `prompt_embeds`.
    Raises ValueError for components that do not fit the student.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar = ["latents"]
    transformer: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(self, transformer: Any, vae: Any = None, text_encoder: Any = None, tokenizer: Any = None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        student, conditions = transformer.student, transformer.student.config.conditions
        labels = len(conditions) == 1 and conditions[0].classes
        if not labels and [condition.name for condition in conditions] != ["text", "text_mask"]:
            raise ValueError(
                f"ARDPipeline: a {student.config.family} takes {', '.join(map(str, conditions))}; expected labels of "
                "classes, or text and text_mask"
            )
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("ARDPipeline: got one of text_encoder and tokenizer; expected both or neither")
        _require_fit(
            student,
            None if vae is None else vae.config.latent_channels,
            None if text_encoder is None else text_encoder.config.d_model,
        )
        for name in UNREAD if vae is not None else ():
            if vae.config.get(name) is not None:
                raise ValueError(f"ARDPipeline: vae has {name}={shown(vae.config[name])}; expected a scale only")
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> Any:
        """As `DiffusionPipeline`, from safetensors unless use_safetensors says otherwise."""
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **options})

    @property
    def student(self) -> ARDStudent:
        return self.transformer.student

    @property
    def num_timesteps(self) -> int:
        """The student's steps."""
        return self.student.steps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
    ) -> Any:
        """Images of prompts or classes: ``.images``, a list for "pil", (B, h, w, c) in [0, 1] for "np", or a tensor.

        Give one of prompt, class_labels and prompt_embeds (n, N, E) with prompt_attention_mask (n, N).
        num_images_per_prompt: also of a class. Images of one prompt follow one another.
        generator: one for all images, or a list of one for each. latents: the noise (B, c, h, w) in its place.
        output_type: "pil", "np", "pt" (B, c, h, w in [0, 1]) or "latent", the student's last states.
        callback_on_step_end: called as (pipe, step, timestep, {"latents": states}) after each step; "latents" in the
            dict that it returns, if any, take the states' place.
        Raises ValueError for what does not fit the student, num_inference_steps other than its steps, guidance_scale
        other than 1 and a negative prompt: both are distilled into its weights.
        """
        self._check_distilled(num_inference_steps, guidance_scale, negative_prompt)
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)
        conditions = self._conditions(prompt, class_labels, prompt_embeds, prompt_attention_mask)
        if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: got {num_images_per_prompt!r}; expected at least 1")
        conditions = tuple(tensor.repeat_interleave(num_images_per_prompt, dim=0) for tensor in conditions)
        noise_Bchw = self.prepare_latents(len(conditions[0]), generator, latents)
        times = self.student.timesteps(self.student.steps, noise_Bchw.device)[0]
        with self.progress_bar(total=self.student.steps) as bar:

            def on_step(step: int, states_Bchw: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                inputs = {name: states_Bchw for name in callback_on_step_end_tensor_inputs}
                outputs = callback_on_step_end(self, step, times[step], inputs)
                return _replaced(outputs, states_Bchw)

            states_Bchw = self.transformer(noise_Bchw, *conditions, on_step=on_step)[:, -1]
        images = states_Bchw if output_type == "latent" else self._images(states_Bchw, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompt: str | list[str]) -> tuple[Tensor, Tensor]:
        """prompt_embeds (n, N, E) and prompt_attention_mask (n, N) bool of prompts, cut to N tokens with a warning."""
        if self._condition.classes:
            raise ValueError(f"prompt: got one for a student that takes {self._condition}; expected class_labels")
        if self.text_encoder is None:
            raise ValueError("prompt: got one without a text_encoder and a tokenizer; expected them, or prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt: got {type(prompt).__name__} {prompt!r:.80}; expected text or a list of texts")
        tokens = self._condition.shape[0]
        if cut := [text for text, n in zip(prompts, token_counts(self.tokenizer, prompts), strict=True) if n > tokens]:
            ids = self.tokenizer(cut, truncation=False, verbose=False)["input_ids"]
            removed = self.tokenizer.batch_decode([each[tokens - 1 : -1] for each in ids])
            logger.warning(
                "The following part of your input was truncated because the student reads sequences up to "
                f"{tokens} tokens: {removed}"
            )
        # Not by the model's own device, which is the CPU while accelerate keeps the weights there.
        return encode_texts(self.tokenizer, self.text_encoder, prompts, tokens, device=self._execution_device)

    def prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise (batch, c, h, w): drawn in float32, the same in every dtype, or ``latents``."""
        shape = (batch, *self.student.config.image_shape)
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is not None:
            if tuple(latents.shape) != shape or not latents.is_floating_point():
                got = f"{tuple(latents.shape)} {latents.dtype}"
                raise ValueError(f"latents: got {got}; expected {shape} floating point")
            return latents.to(device, dtype)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: got a list of {len(generator)}; expected one for each of {batch} images")
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    @property
    def _condition(self) -> Condition:
        """Labels, or text (N, E)."""
        return self.student.config.conditions[0]

    def _conditions(
        self,
        prompt: str | list[str] | None,
        class_labels: int | Sequence[int] | Tensor | None,
        embeds_nNE: Tensor | None,
        mask_nN: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """The student's conditions, one row a prompt or class, on its device."""
        given = {"prompt": prompt, "class_labels": class_labels, "prompt_embeds": embeds_nNE}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(f"got {' and '.join(names) or 'nothing'}; expected exactly one of {', '.join(given)}")
        if (embeds_nNE is None) != (mask_nN is None):
            raise ValueError("expected prompt_embeds and prompt_attention_mask together; got one of them")
        device = self._execution_device
        if class_labels is not None:
            return (self._class_labels(class_labels).to(device),)
        if prompt is not None:
            embeds_nNE, mask_nN = self.encode_prompt(prompt)
        assert embeds_nNE is not None and mask_nN is not None
        if self._condition.classes:
            raise ValueError(f"prompt_embeds: got text for a student that takes {self._condition}; expected labels")
        (N, E), n = self._condition.shape, len(embeds_nNE)
        if n < 1 or tuple(embeds_nNE.shape) != (n, N, E) or tuple(mask_nN.shape) != (n, N):
            raise ValueError(
                f"prompt_embeds, prompt_attention_mask: got {tuple(embeds_nNE.shape)}, {tuple(mask_nN.shape)}; "
                f"expected (n, {N}, {E}), (n, {N})"
            )
        if not embeds_nNE.is_floating_point() or not ((mask_nN == 0) | (mask_nN == 1)).all():  # no additive mask
            raise ValueError(
                f"prompt_embeds, prompt_attention_mask: got {embeds_nNE.dtype}, and a mask from {mask_nN.min()} to "
                f"{mask_nN.max()}; expected floating point, and 1 for the tokens to read, 0 for the others"
            )
        return embeds_nNE.to(device, self.transformer.dtype), mask_nN.to(device, torch.bool)

    def _class_labels(self, class_labels: int | Sequence[int] | Tensor) -> Tensor:
        condition = self._condition
        if not condition.classes:
            raise ValueError("class_labels: got labels for a student that takes text; expected prompt or prompt_embeds")
        labels = torch.atleast_1d(torch.as_tensor(class_labels))
        if labels.ndim != 1 or not len(labels) or labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"class_labels: got {tuple(labels.shape)} {labels.dtype}; expected integers, one at least")
        if wrong := condition.wrong_values(labels):
            raise ValueError(f"class_labels: {wrong}")
        return labels.to(torch.int64)

    def _check_distilled(self, steps: int | None, scale: float | None, negative: str | list[str] | None) -> None:
        if steps not in (None, self.student.steps):
            raise ValueError(
                f"num_inference_steps: got {steps}; expected {self.student.steps}, for which the student was trained"
            )
        if scale not in (None, 1, 1.0):
            raise ValueError(f"guidance_scale: got {scale}; expected none: guidance is distilled into the student")
        if negative is not None:
            raise ValueError("negative_prompt: got one; expected none: guidance is distilled into the student")

    def _check_outputs(self, output_type: str, inputs: Sequence[str]) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: got {output_type!r}; expected one of {OUTPUT_TYPES}")
        channels = self.student.config.in_channels
        if output_type != "latent" and self.vae is None and channels not in IMAGE_CHANNELS:
            raise ValueError(f"vae: got none for states of {channels} channels; expected one, or output_type='latent'")
        if others := [name for name in inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: got {others}; expected some of {self._callback_tensor_inputs}"
            )

    def _images(self, states_Bchw: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            latents = states_Bchw.to(self.vae.dtype) / self.vae.config.scaling_factor
            states_Bchw = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(states_Bchw, output_type=output_type)


def _replaced(outputs: Any, states_Bchw: Tensor) -> Tensor | None:
    """What a callback gave in place of the states."""
    if outputs is not None and not isinstance(outputs, dict):
        raise ValueError(f"callback_on_step_end: gave a {type(outputs).__name__}; expected a dict or None")
    latents = (outputs or {}).get("latents")
    if latents is None or latents is states_Bchw:
        return None
    if not isinstance(latents, Tensor) or latents.shape != states_Bchw.shape or not latents.is_floating_point():
        got = f"{tuple(latents.shape)} {latents.dtype}" if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"callback_on_step_end: latents are {got}; expected {tuple(states_Bchw.shape)} floating point")
    return latents.to(states_Bchw)


def _require_fit(student: ARDStudent, latent_channels: int | None, text_channels: int | None) -> None:
    """Raises ValueError unless a VAE and a text encoder of these channels, if any, are of the student's sizes."""
    config = student.config
    if latent_channels not in (None, config.in_channels):
        raise ValueError(f"vae: has latents of {latent_channels} channels; expected the student's {config.in_channels}")
    condition = config.conditions[0]
    if text_channels is not None and condition.classes:
        raise ValueError(f"text_encoder: got one for a student that takes {condition}; expected none")
    if text_channels is not None and text_channels != condition.shape[1]:
        raise ValueError(f"text_encoder: gives {text_channels} channels; expected the student's {condition.shape[1]}")


def write_pipeline(
    folder: str | os.PathLike,
    student: ARDStudent,
    *,
    vae: str | os.PathLike | None = None,
    text_encoder: str | os.PathLike | None = None,
    link: bool = False,
) -> None:
    """Writes a folder for `ARDPipeline.from_pretrained`, whole or not at all.

    folder: a new one. vae: as `ard.weights.vae.LatentCodec` takes it. text_encoder: as
    `ard.weights.text_encoder.T5TextEncoder`; the tokenizer comes from it, too.
    link: symbolic links to the components' folders, which must then stay, in place of copies.
    Raises, before anything is written, FileExistsError for a folder that is there, ValueError for components that do
    not load (of the text encoder's weights, names and sizes are looked at) or do not fit the student.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; expected a new folder")
    codec = None if vae is None else LatentCodec(vae)
    files = None if text_encoder is None else TextEncoderFiles.of(text_encoder)
    transformer = ARDTransformer.of(student)
    _require_fit(student, None if codec is None else codec.latent_channels, None if files is None else files.channels)
    index: dict[str, Any] = {
        "_class_name": ARDPipeline.__name__,
        "_diffusers_version": diffusers.__version__,
        "transformer": [__name__, ARDTransformer.__name__],
        **{name: [None, None] for name in ARDPipeline._optional_components},
    }
    parts: dict[str, tuple[Path, list[Path]]] = {}  # name -> folder, and what of it is needed
    if vae is not None:
        source = model_folder(vae, "vae")
        needed = [source / "config.json", *weight_files(source), source / INDEX_NAME]
        parts["vae"], index["vae"] = (source, needed), ["diffusers", "AutoencoderKL"]
    if files is not None:
        parts["text_encoder"], parts["tokenizer"] = (files.model, files.of_model), (files.tokenizer, files.of_tokenizer)
        index["text_encoder"] = ["transformers", "T5EncoderModel"]
        index["tokenizer"] = ["transformers", type(files.load_tokenizer()).__name__]
    with atomic_folder(folder) as temporary:
        with atomic_folder(temporary / "transformer") as part:
            transformer.save_pretrained(part)
        for name, (source, needed) in parts.items():
            if link:
                (temporary / name).symlink_to(source.resolve(), target_is_directory=True)
            else:
                _copy(needed, temporary / name)
        write_json(temporary / ARDPipeline.config_name, index)


def _copy(files: Sequence[Path], folder: Path) -> None:
    with atomic_folder(folder) as part:
        for file in filter(Path.is_file, files):
            shutil.copyfile(file, part / file.name)
