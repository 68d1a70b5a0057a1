# shellcheck shell=bash
#
# Functions that the project's scripts share; source it, do not run it:
#
#     source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"
#
# Everything that a script fetches or builds goes to $MICROVM_CACHE, outside the checkout, so that a checkout
# stays small and several checkouts share one copy. A result is made under a temporary name and renamed when
# it is whole: an interrupted script leaves nothing that a later run would take for finished.

# die MESSAGE…: one line on standard error, "script: message", and exit status 1.
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

MICROVM_CACHE="${MICROVM_CACHE:-${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}/microvm}"
case "$MICROVM_CACHE" in
    /microvm) die "there is no HOME: set MICROVM_CACHE to a folder for what the scripts fetch" ;;
    /*) export MICROVM_CACHE ;;
    # A relative one would mean another folder in each script.
    *) die "MICROVM_CACHE is $MICROVM_CACHE: give an absolute path" ;;
esac

# note MESSAGE…: one line of progress on standard error.
note() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# usage: prints the header comment of $script, which each script with flags sets to its own path (from line 2 to the
# first line that is no comment).
usage() {
    # shellcheck disable=SC2154 # set by the caller
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$script"
}

# as_root COMMAND…: runs it as root, with sudo where needed.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "'$*' needs root: run it as root, or install sudo"
    fi
}

# apt_logged COMMAND…: runs it quietly; on failure prints the last lines it said and returns its status.
apt_logged() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" = 0 ] || tail -n 5 "$log" >&2
    rm -f "$log"
    return "$status"
}

# apt_update: refreshes the package lists, at most once in a run.
apt_update() {
    [ -z "${MICROVM_APT_UPDATED:-}" ] || return 0
    command -v apt-get >/dev/null || die "no apt-get here: these scripts need Debian 12 or a relative"
    note "refreshing the package lists (apt-get update)"
    apt_logged as_root apt-get -q update || die "apt-get update failed: check the network and the package sources"
    export MICROVM_APT_UPDATED=1
}

# apt_candidate NAME: the version apt would install, or nothing.
apt_candidate() {
    LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p' | grep -vx '(none)' || true
}

# ensure_packages PKG…: installs those that are missing; silent and instant when none is.
ensure_packages() {
    local pkg missing=()
    for pkg; do
        # shellcheck disable=SC2016 # a format of dpkg-query's, not an expansion
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$pkg" 2>/dev/null)" = installed ] || missing+=("$pkg")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    for pkg in "${missing[@]}"; do
        [ -n "$(apt_candidate "$pkg")" ] || apt_update
    done
    note "installing ${missing[*]}"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600
        install --no-install-recommends "${missing[@]}")
    # Old lists name packages that the mirror has replaced since, so one refresh and a second try.
    apt_logged as_root "${install[@]}" 2>/dev/null && return 0
    apt_update
    apt_logged as_root "${install[@]}" || die "cannot install ${missing[*]}: see the lines above"
}

# download_debs DIR PACKAGE[=VERSION]…: the packages' files in DIR, not installed.
download_debs() {
    local dir=$1
    shift
    (cd "$dir" && apt_logged apt-get -q download "$@" 2>/dev/null) && return 0
    # There are no lists, or old ones, with packages that the mirror has replaced since.
    apt_update
    (cd "$dir" && apt_logged apt-get -q download "$@") || die "cannot download the Debian packages $*: see the lines above"
}

# fetch_deb NAME[=VERSION] DIR: unpacks the package's files under DIR without installing it. DIR belongs to
# this one package; where it already exists nothing is done (remove it to fetch anew). In a subshell, for its trap:
# an interrupted run leaves nothing.
fetch_deb() (
    package=$1 dir=$2
    [ ! -d "$dir" ] || return 0
    mkdir -p "$(dirname "$dir")"
    tmp=$(mktemp -d "$dir.XXXXXX")
    trap 'rm -rf "$tmp"' EXIT
    trap 'exit 130' INT TERM HUP
    download_debs "$tmp" "$package"
    mkdir "$tmp/root"
    dpkg -x "$tmp"/*.deb "$tmp/root" || die "cannot unpack the Debian package $package"
    # A second run may have made DIR meanwhile; then its copy stays.
    mv -T "$tmp/root" "$dir" 2>/dev/null || [ -d "$dir" ] || die "cannot create $dir"
)

# lock NAME: waits until no other run holds NAME and holds it until `unlock NAME` or the end of the script.
# Programs started meanwhile inherit it: unlock before starting one that outlives the work.
declare -A MICROVM_LOCKS=()
lock() {
    local fd
    mkdir -p "$MICROVM_CACHE/locks" 2>/dev/null || die "cannot write to the cache folder $MICROVM_CACHE: set MICROVM_CACHE"
    exec {fd}>"$MICROVM_CACHE/locks/$1" || die "cannot open $MICROVM_CACHE/locks/$1"
    if ! flock -n "$fd"; then
        note "waiting for another run that holds the lock $1"
        flock "$fd"
    fi
    MICROVM_LOCKS[$1]=$fd
}

unlock() {
    local fd=${MICROVM_LOCKS[$1]:-}
    [ -n "$fd" ] || return 0
    exec {fd}>&-
    unset "MICROVM_LOCKS[$1]"
}
