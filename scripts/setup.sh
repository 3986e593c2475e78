#!/usr/bin/env bash
# Makes .venv with exactly the versions of constraints.txt and looks after the two system libraries.
# `make` calls it before everything else; when nothing has changed it does nothing.
#
#   PYTHON=/path/to/python3.12 make   takes this interpreter instead of searching for one
set -euo pipefail
cd "$(dirname "$0")/.."
root="$(pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/.foresight-setup"      # what was installed, for which folder
apt_tried="$venv/.foresight-apt"    # apt-get was asked once and could not help: do not ask at every call

say() { printf '%s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# --- Python ------------------------------------------------------------------------------------------------

# A pyenv shim exists for versions that are not selected, so only running an interpreter tells.
fits() {
    "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' </dev/null >/dev/null 2>&1
}

# Without uv the environment is made by the venv module, which Debian packs separately from Python.
can_make_venv() {
    fits "$1" && { [ -n "$uv" ] || "$1" -c 'import ensurepip, venv' </dev/null >/dev/null 2>&1; }
}

find_uv() {
    local candidate
    for candidate in uv "$venv/bin/uv"; do
        if "$candidate" --version </dev/null >/dev/null 2>&1; then
            say "$candidate"
            return
        fi
    done
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || die "PYTHON=$PYTHON does not run as Python 3.12 or 3.13."
        say "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.13 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
        if can_make_venv "$candidate"; then
            say "$candidate"
            return
        fi
    done
    local fetch="$uv" borrowed=""
    if [ -z "$fetch" ]; then
        # Any older Python can run uv, and uv can fetch a newer Python.
        borrowed="$(mktemp -d)"
        python3 -m venv "$borrowed" >/dev/null 2>&1 &&
            "$borrowed/bin/pip" install --quiet --disable-pip-version-check uv </dev/null >&2 &&
            fetch="$borrowed/bin/uv"
    fi
    if [ -n "$fetch" ]; then
        # --system: the search must not end at the environment we are about to make
        candidate="$("$fetch" python find --system --no-project '>=3.12,<3.14' 2>/dev/null)" ||
            { say "Fetching Python 3.12 with uv." >&2 &&
                "$fetch" python install 3.12 </dev/null >&2 &&
                candidate="$("$fetch" python find --system --no-project '>=3.12,<3.14')"; } ||
            candidate=""
    fi
    [ -z "$borrowed" ] || rm -rf "$borrowed"
    if [ -n "$fetch" ] && [ -n "$candidate" ]; then
        say "$candidate"
        return
    fi
    die "no Python 3.12 or 3.13 with its venv module found on PATH, under pyenv or through uv. Install one:
  Debian, Ubuntu   sudo apt-get install python3.12 python3.12-venv    (where the release has it)
  Fedora           sudo dnf install python3.12
  macOS            brew install python@3.12
  anywhere         pyenv install 3.12, or: pip install uv && uv python install 3.12
or name it: PYTHON=/path/to/python3.12 make"
}

# --- The environment ---------------------------------------------------------------------------------------

wanted() { # changes when the folder moves (scripts name it) or when what to install does
    say "$root"
    cat pyproject.toml constraints.txt | cksum
}

is_current() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ] && fits "$python"
}

make_venv() {
    if [ -f "$stamp" ] && { [ "$(head -n 1 "$stamp")" != "$root" ] || ! fits "$python"; }; then
        say "The folder was moved or its Python is gone: making .venv anew."
        rm -rf "$venv"
    fi
    uv="$(find_uv)"
    if [ ! -e "$venv" ]; then
        local base
        base="$(find_python)"
        say "Making .venv with $("$base" --version)."
        if "$base" -c 'import ensurepip, venv' </dev/null >/dev/null 2>&1; then
            "$base" -m venv "$venv"
        else
            "$uv" venv --quiet --python "$base" "$venv"
        fi
    elif ! fits "$python"; then
        die ".venv exists but is no working Python 3.12 or 3.13. Remove it (rm -r .venv) and run make again."
    fi
    if [ -z "$uv" ]; then
        # The pip that comes with Python gives up on a set of this size, but it can fetch uv.
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
        "$python" -m pip install --quiet --disable-pip-version-check uv </dev/null
        uv="$venv/bin/uv"
    fi
}

install_packages() {
    local quiet=""
    [ -t 1 ] || quiet="--quiet" # a log needs no list of 130 packages
    say "Installing the versions of constraints.txt (the first time some GB are downloaded: PyTorch)."
    say "$root" >"$stamp" # ours, and not finished
    # The largest wheels pause longer than uv's default of 30 s on slow mirrors.
    UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}" "$uv" pip install $quiet --python "$python" \
        --constraints constraints.txt --build-constraints constraints.txt --editable '.[dev]' </dev/null ||
        die "the installation stopped (see above). What was downloaded is kept: run make again.
If the disk is full: .venv takes about 7 GB, and uv's cache as much again if it lies on another disk."
    wanted >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

# --- System libraries (Linux; macOS brings its own OpenGL) ---------------------------------------------------

loads() { # loads OSMesa libOSMesa.so.8: found the way PyOpenGL and torchcodec find it
    "$python" -c '
import ctypes, ctypes.util, sys
name, *files = sys.argv[1:]
try:
    ctypes.CDLL(ctypes.util.find_library(name) or files[0])
except OSError:
    sys.exit(1)' "$@" </dev/null 2>/dev/null
}

needs_osmesa() {
    case "${MUJOCO_GL:-osmesa}" in osmesa) ! loads OSMesa libOSMesa.so.8 ;; *) false ;; esac
}

needs_ffmpeg() {
    ! loads avcodec libavcodec.so
}

apt_install() { # apt_install PACKAGE: true if it was installed
    local as_root=""
    [ ! -e "$apt_tried" ] && command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" != 0 ]; then
        sudo -n true </dev/null >/dev/null 2>&1 || return 1
        as_root="sudo -n"
    fi
    say "Installing $1 with apt-get."
    # A fresh machine has no package lists yet; one that has just booted may hold dpkg's lock for a while.
    $as_root apt-get update -qq </dev/null >/dev/null 2>&1 || true
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=120 "$1" </dev/null >/dev/null || {
        touch "$apt_tried"
        return 1
    }
}

look_after_libraries() {
    [ "$(uname -s)" = Linux ] || return 0
    if needs_osmesa && ! { apt_install libosmesa6 && ! needs_osmesa; }; then
        cat >&2 <<'MESSAGE'

OSMesa (libOSMesa.so.8) is missing: the library that renders the simulator without a screen or a GPU.
`make quickstart`, `make quickstart-mini`, `make benchmark` and the simulator's tests need it;
the model and training do not.
  Debian, Ubuntu   sudo apt-get update && sudo apt-get install -y libosmesa6
  Fedora           sudo dnf install -y mesa-libOSMesa
  macOS            not needed there
With a GPU, or where the distribution no longer has it: export MUJOCO_GL=egl, which renders through EGL.

MESSAGE
    fi
    # Said once, with the installation: LeRobot manages without, only slower.
    if [ "$installed" = yes ] && needs_ffmpeg && ! apt_install ffmpeg; then
        say "FFmpeg's libraries are missing: videos are read through PyAV instead of torchcodec. Package: ffmpeg."
    fi
}

installed=no
if ! is_current; then
    make_venv
    install_packages
    installed=yes
fi
look_after_libraries
if [ "$installed" = yes ]; then
    say "Ready: $("$python" --version) in .venv. \`make help\` lists what there is, \`make quickstart\` tries it all."
fi
