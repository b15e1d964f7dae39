#!/bin/sh
# Installs the Debian packages whose programs the tests and the demo run on this computer. It prints what it installs,
# and does nothing if nothing is missing.
set -eu
missing=
need() { # PROGRAM PACKAGE...
	program=$1
	shift
	command -v "$program" >/dev/null && return
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
need clang clang libbpf-dev linux-libc-dev # compiles bpf/capture.c
need llvm-strip llvm
need node nodejs
need npm npm
[ -n "$missing" ] || exit 0
[ "$(id -u)" = 0 ] || { echo "these Debian packages are missing:$missing; install them, or run this as root" >&2; exit 1; }
echo "installing the missing Debian packages:$missing"
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y $missing >/dev/null
