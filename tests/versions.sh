#!/usr/bin/env bash
# The tests on other versions than those of constraints.txt. By hand, not in the gate: each set is an environment of its
# own, of gigabytes, and minutes of tests.
#
#     tests/versions.sh                          every set
#     tests/versions.sh oldest                   one of them
#     tests/versions.sh oldest -- -k output      with arguments for pytest
#
# PYTHON is the interpreter, a name or a path (default python3): PYTHON=python3.13 tests/versions.sh newest
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

declare -A sets=(
    [oldest]="torch==2.11.0 transformers==5.17.0" # the least torch that pyproject.toml takes
    [pinned]="-c constraints.txt"
    [newest]="" # whatever pip finds
)

chosen=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do chosen+=("$1"); shift; done
[ "${1:-}" = "--" ] && shift
[ ${#chosen[@]} -gt 0 ] || chosen=(oldest pinned newest)

python=${PYTHON:-python3}
for name in "${chosen[@]}"; do
    [ -v "sets[$name]" ] || { echo "there is no set $name: choose from ${!sets[*]}" >&2; exit 2; }
    version=$("$python" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')
    environment=.ci/venv-versions/$name-$version
    [ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
    # shellcheck disable=SC2086  # several words are meant
    "$environment/bin/pip" install --quiet --upgrade -e ".[test,export]" ${sets[$name]}
    printf '\n== %s, Python %s: ' "$name" "$version"
    "$environment/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
    "$environment/bin/python" -m pytest -q "$@"
done
