#!/bin/sh
# Install the server of this checkout into an environment of its own: packages as in constraints.txt, no pip, an SBOM.
#
#     deploy/install.sh /opt/deconvd server            # server,cuda13 for GPUs
#
# This is how the container images are made (Dockerfile), and it makes the same on a host. It replaces what is in the
# folder. A third argument runs one of the two steps alone: `packages` installs what pyproject.toml requires, and reads
# no other file but constraints.txt; `deconvd` installs deconvd. They are apart so that an image has a layer for each,
# and a new deconvd does not replace gigabytes. With DESTDIR, the files of `deconvd` go below that folder.
#
# It needs Python >= 3.11 with its venv module as python3, and a package index, by pip's usual settings.
set -eu

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    echo "usage: $0 FOLDER EXTRA[,EXTRA...] [packages|deconvd]" >&2
    exit 2
fi
case $1 in
/*) folder=$1 ;;
*) folder=$PWD/$1 ;;
esac
extras=$2 step=${3-}
tools=$folder-build
cd "$(dirname "$0")/.."

list_requirements() {
    python3 - "$extras" <<'END'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
known = project["optional-dependencies"]
extras = sys.argv[1].split(",")
if unknown := ", ".join(extra for extra in extras if extra not in known):
    sys.exit(f"EXTRA must be one of {', '.join(known)}, got {unknown}")
print(*project["dependencies"], *(line for extra in extras for line in known[extra]), sep="\n")
END
}

install_packages() {
    requirements=$(list_requirements)
    if [ -n "$(ls -A "$folder" 2>&-)" ] && [ ! -f "$folder/pyvenv.cfg" ]; then
        echo "$0: $folder has files, and is no environment of Python: name another folder" >&2
        exit 1
    fi
    rm -rf "$folder" "$tools"
    python3 -m venv "$tools"
    "$tools/bin/pip" install --no-compile --only-binary :all: --constraint constraints.txt hatchling cyclonedx-bom
    python3 -m venv --without-pip "$folder"
    echo "$requirements" >"$tools/requirements.txt"
    "$tools/bin/pip" --python "$folder/bin/python" install --only-binary :all: --constraint constraints.txt \
        --requirement "$tools/requirements.txt"
}

install_deconvd() {
    destination=${DESTDIR-}
    "$tools/bin/pip" wheel --no-deps --no-build-isolation --wheel-dir "$tools/wheel" .
    "$tools/bin/pip" --python "$folder/bin/python" install --no-deps --root "$destination/" "$tools"/wheel/*.whl
    PYTHONPATH=$(echo "$destination$folder"/lib/python3.*/site-packages) # Python does not look below DESTDIR by itself
    export PYTHONPATH
    "$tools/bin/pip" --python "$folder/bin/python" check
    # The SBOM tells the version of what it is about, which pyproject.toml leaves to the code.
    version=$("$folder/bin/python" -c 'import deconvd; print(deconvd.__version__)')
    sed "s/^dynamic = .*/version = \"$version\"/" pyproject.toml >"$tools/pyproject.toml"
    "$tools/bin/cyclonedx-py" environment --output-reproducible --pyproject "$tools/pyproject.toml" \
        --output-file "$destination$folder/sbom.cdx.json" "$folder/bin/python"
}

case $step in
packages) install_packages ;;
deconvd) install_deconvd ;;
"")
    install_packages
    install_deconvd
    rm -rf "$tools"
    ;;
*)
    echo "$0: the step must be packages or deconvd, got $step" >&2
    exit 2
    ;;
esac
