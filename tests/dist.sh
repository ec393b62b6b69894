#!/usr/bin/env bash
# dist.sh PYTHON [TORCH]: dist/ gets the manylinux wheel of this Python, made from the sdist that is there; both are tried,
# with torch 2.13 or with that of the environment TORCH, under the constraints that it has.
# Called by `make dist`, for two Pythons at once. Everything else is made in build/dist and removed again.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/build/dist/tools/bin
work=$(mktemp -d "$PWD/build/dist/XXXXXX")
trap 'rm -rf "$work"' EXIT

"$1" -m venv "$work/venv"
if [ $# = 2 ]; then
  export PIP_CONSTRAINT=$PWD/$2/constraints.txt
  ls -d "$PWD/$2"/lib/python3.*/site-packages > "$(echo "$work"/venv/lib/python3.*/site-packages)/torch.pth"
else # a dependency of the package: pinned, because a range would bring another build
  "$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0
fi

# What pip makes of the sdist, and installs when it is given one.
"$work/venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$work" dist/*.tar.gz
# libgomp stays out: one grafted under another name would be a second OpenMP runtime beside torch's, with threads of its
# own. As it is, the name libgomp.so.1 resolves to torch's, which is loaded first (tests/dist_trial.py counts them).
# The tag is the oldest glibc that the symbols allow; auditwheel finds it.
PATH=$tools:$PATH auditwheel repair --exclude libgomp.so.1 --wheel-dir "$work/repaired" "$work"/*.whl \
  2> "$work/auditwheel.log" || { cat "$work/auditwheel.log"; exit 1; }
cp "$work"/repaired/*manylinux*.whl dist

trial() { # from another folder, so that nothing is found but what was installed
  (cd "$work" && "$work/venv/bin/python" "$OLDPWD/tests/dist_trial.py" "$@")
}
"$work/venv/bin/pip" install --quiet --no-compile "$work"/*.whl
trial
"$work/venv/bin/pip" uninstall --quiet --yes ard-kernels
"$work/venv/bin/pip" install --quiet --no-compile "$(echo "$work"/repaired/*.whl)[train]"
trial --command "$work/venv/bin/ard"
