# shellcheck shell=bash
# What the set-up steps share: root's rights where they are needed, and apt without its chatter.

# as_root COMMAND...: as root, by sudo where this is not root.
as_root() {
    if [[ $EUID == 0 ]]; then "$@"; else sudo "$@"; fi
}

# apt OPERATION...: as root, quiet unless it fails; a lock that another program holds is waited for.
apt() {
    local log
    log=$(mktemp)
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

# lists: apt's lists of packages, fetched where there are none (images of machines often leave them out).
lists() {
    [[ -n $(apt-get indextargets --format '$(SITE)' 'Identifier: Packages' 2>/dev/null) ]] || apt update
}

# debian_site: the site of the mirror that this machine's Debian packages come from.
debian_site() {
    apt-get indextargets --format '$(SITE)' 'Identifier: Packages' | grep '/debian/\?$' | head -n 1
}
