# shellcheck shell=bash
# What the recipes share: Debian's release, steps that print their time, the tools of that release.

# The Debian release of every part. Kernel, base and bundles move together.
readonly SUITE=trixie
readonly ARCH=amd64

# The folder of the parts' caches, and that of the finished image.
: "${IMAGE_OUT:?the folder to build into}"
readonly CACHE=$IMAGE_OUT/.cache
# Times in the file systems, so that one recipe and one set of packages give one file.
export SOURCE_DATE_EPOCH=1735689600

# note TEXT: a line for a person.
note() { printf 'image: %s\n' "$*"; }

# step NAME COMMAND...: runs it, prints its name and its time.
step() {
    local name=$1 begin=$EPOCHREALTIME
    shift
    "$@"
    local took=$(((${EPOCHREALTIME/./} - ${begin/./}) / 100000))
    printf 'image: %-44s %4d.%d s\n' "$name" $((took / 10)) $((took % 10))
}

# debian TARGET.tar ARGUMENT...: mmdebstrap, with its chatter shown only when it fails. As an ordinary
# user it works in a user namespace; hooks that touch host files are mmdebstrap's own (upload, tar-in),
# because the namespace's root cannot look into a private home folder.
debian() {
    local target=$1 log=$1.log
    shift
    if ! (cd / && mmdebstrap --architectures="$ARCH" "$@" "$SUITE" - >"$target" 2>"$log"); then
        tail -n 40 "$log" >&2
        rm -f "$target"
        return 1
    fi
    rm -f "$log"
}

# unpack TAR FOLDER [MEMBER...]: without device nodes, which need privileges. Every name as `./…`.
unpack() {
    local tar=$1 folder=$2
    shift 2
    mkdir -p "$folder"
    tar --extract --file "$tar" --directory "$folder" --no-same-owner --exclude='./dev/*' --wildcards "$@"
}

# tool NAME ARGUMENT...: a program of the tools part, by that release's own loader and libraries,
# so that the image does not depend on the host's versions.
tool() {
    local tools=$CACHE/tools/usr name=$1 program
    shift
    program=$tools/bin/$name
    [[ -e $program ]] || program=$tools/sbin/$name
    "$tools/lib64/ld-linux-x86-64.so.2" --library-path "$tools/lib/x86_64-linux-gnu" "$program" "$@"
}

# erofs TARGET ARGUMENT... SOURCE: quiet unless it fails.
erofs() {
    local log=$1.log
    if ! tool mkfs.erofs -T"$SOURCE_DATE_EPOCH" -U clear "$@" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        return 1
    fi
    rm -f "$log"
}

# known PACKAGE...: an argument for `debian` that leaves what apt says of these packages in the root's
# /packages, because unpacked packages are in no dpkg status.
known() {
    # shellcheck disable=SC2016 # the hook's shell has these variables
    printf -- '--extract-hook=APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-cache --no-all-versions show %s >"$1/packages"' "$*"
}

# version FILE PACKAGE: its version, in a file of Debian's control format.
version() {
    awk -v package="$2" -v RS= 'match($0, /^Package: [^\n]+/) && substr($0, 10, RLENGTH - 9) == package &&
        match($0, /\nVersion: [^\n]+/) { print substr($0, RSTART + 10, RLENGTH - 10); exit }' "$1"
}
