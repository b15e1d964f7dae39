#!/bin/sh
# Installs the Debian packages with the programs that tests and demo run on the machine itself. It says so, and does
# nothing when they are there.
set -eu
missing=
need() { # PROGRAM PACKAGE
	command -v "$1" >/dev/null || case " $missing " in *" $2 "*) ;; *) missing="$missing $2" ;; esac
}
need iptables-nft iptables
need iptables-legacy iptables
need ip iproute2
need nsenter util-linux
need curl curl
need ping iputils-ping
need sysctl procps
need dpkg-deb dpkg
need openssl openssl
need node nodejs
need npm npm
[ -n "$missing" ] || exit 0
[ "$(id -u)" = 0 ] || { echo "these Debian packages are missing:$missing; install them, or run this as root" >&2; exit 1; }
echo "installing the Debian packages that are missing:$missing"
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y $missing >/dev/null
