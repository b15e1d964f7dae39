#!/bin/sh
# Installs the Debian packages whose programs the tests and the demo run on this computer. It prints what it installs,
# and does nothing if nothing is missing.
set -eu
missing=
need() { # PROGRAM or FILE, PACKAGE...
	wanted=$1
	shift
	case $wanted in
	/*) [ -e "$wanted" ] && return ;;
	*) command -v "$wanted" >/dev/null && return ;;
	esac
	for package in "$@"; do
		case " $missing " in *" $package "*) ;; *) missing="$missing $package" ;; esac
	done
}
need gcc gcc libc6-dev # for Go's race detector
need iptables-nft iptables
need iptables-legacy iptables
need ip iproute2
need nsenter util-linux
need curl curl
need ping iputils-ping
need sysctl procps
need dpkg-deb dpkg
need openssl openssl
need clang clang # compiles bpf/capture.c
need llvm-strip llvm
need /usr/include/bpf/bpf_helpers.h libbpf-dev
need /usr/include/linux/bpf.h linux-libc-dev
need node nodejs
need npm npm
[ -n "$missing" ] || exit 0
[ "$(id -u)" = 0 ] || { echo "these Debian packages are missing:$missing; install them, or run this as root" >&2; exit 1; }
echo "installing the missing Debian packages:$missing"
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y $missing >/dev/null
