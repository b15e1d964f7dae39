#!/bin/sh
# Assembles the root file system of the NMI image, without NMI itself: both iptables back ends with what they load at
# run time, CA certificates, and nothing else (no shell, no package manager). The Dockerfile and the cluster of the
# end-to-end tests run the same script, so that the tests use what is shipped.
#
# Files come from Debian packages of the release that the script runs on, fetched and verified by apt; nothing is
# installed. It includes all match and target extensions, not only those of our own rules: legacy iptables cannot even
# list a chain in which another program uses an extension that it does not find.
set -eu

usage() {
	cat <<-END
	Usage: rootfs.sh DEST [ARCH]

	Writes the root file system to the folder DEST, which must not exist, be empty, or come from an earlier run.
	ARCH is a Debian architecture (amd64, arm64), by default that of this machine. For another one run first:
	    dpkg --add-architecture ARCH && apt-get update
	END
}

fail() {
	echo "rootfs.sh: $*" >&2
	exit 1
}

case "${1-}" in
-h | --help) usage && exit 0 ;;
'' | -*) usage >&2 && exit 2 ;;
esac
[ $# -le 2 ] || { usage >&2 && exit 2; }

for tool in apt-get dpkg dpkg-deb; do
	command -v "$tool" >/dev/null || fail "$tool is not here: run this on Debian"
done

native=$(dpkg --print-architecture)
arch=${2:-$native}
case $arch in
amd64) triplet=x86_64-linux-gnu loader=lib64/ld-linux-x86-64.so.2 ;;
arm64) triplet=aarch64-linux-gnu loader=lib/ld-linux-aarch64.so.1 ;;
*) fail "architecture $arch is not known: amd64 or arm64" ;;
esac
if [ "$arch" != "$native" ] && ! dpkg --print-foreign-architectures | grep -qx "$arch"; then
	fail "packages of $arch are not known here: run dpkg --add-architecture $arch && apt-get update"
fi

dest=$1
made_by_us=var/lib/dpkg/status.d/iptables
if [ -e "$dest" ] && [ ! -e "$dest/$made_by_us" ] && [ -n "$(ls -A "$dest" 2>&1)" ]; then
	fail "$dest holds something else: name a folder that is empty or does not exist"
fi

packages='iptables libc6 libip4tc2 libip6tc2 libmnl0 libnetfilter-conntrack3 libnfnetlink0 libnftnl11 libxtables12
ca-certificates'

# In the same folder as DEST, so that the finished tree can be renamed to DEST: it never exists incompletely.
mkdir -p "$(dirname "$dest")"
work=$(mktemp -d "$(dirname "$dest")/.rootfs.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
debs=$work/debs unpacked=$work/unpacked root=$work/root
mkdir -p "$debs" "$unpacked" "$root"

echo "rootfs.sh: fetching the packages of $arch"
names=
for package in $packages; do
	case $package in
	ca-certificates) names="$names $package" ;;
	*) names="$names $package:$arch" ;;
	esac
done
# As root, apt downloads as another user, which may not write here, and prints a warning; so set the user explicitly.
# shellcheck disable=SC2086 # one word for each package
(cd "$debs" && apt-get -qq -o APT::Sandbox::User=root download $names) ||
	fail "apt-get could not fetch the packages: run apt-get update, and look at the lines above"

umask 022
mkdir -p "$root/dev" "$root/etc/ssl/certs" "$root/proc" "$root/run" "$root/sys" "$root/tmp" \
	"$root/usr/bin" "$root/usr/sbin" "$root/var/lib/dpkg/status.d"
chmod 1777 "$root/tmp"
ln -s usr/sbin "$root/sbin"

for deb in "$debs"/*.deb; do
	package=$(dpkg-deb -f "$deb" Package)
	dpkg-deb -x "$deb" "$unpacked" || fail "$deb cannot be unpacked"
	# Image scanners read this if there is no package manager.
	{ dpkg-deb -f "$deb" && echo 'Status: install ok installed'; } >"$root/var/lib/dpkg/status.d/$package"
	mkdir -p "$root/usr/share/doc/$package"
	cp "$unpacked/usr/share/doc/$package/copyright" "$root/usr/share/doc/$package/"
done

# put copies one file to the same path, under the name that the loader uses.
put() {
	[ -e "$unpacked/$1" ] || fail "$1 is not in the packages of this Debian release"
	mkdir -p "$root/$(dirname "$1")"
	cp -L "$unpacked/$1" "$root/$1"
}

put "$loader"
put "lib/$triplet/libc.so.6"
put "lib/$triplet/libm.so.6"
for library in libip4tc.so.2 libip6tc.so.2 libmnl.so.0 libnetfilter_conntrack.so.3 libnfnetlink.so.0 libnftnl.so.11 \
	libxtables.so.12; do
	if [ -e "$unpacked/lib/$triplet/$library" ]; then # the folder differs between packages
		put "lib/$triplet/$library"
	else
		put "usr/lib/$triplet/$library"
	fi
done

extensions=usr/lib/$triplet/xtables
mkdir -p "$root/$extensions"
cp -P "$unpacked/$extensions"/libxt_*.so "$unpacked/$extensions"/libipt_*.so "$root/$extensions/"

for backend in nft legacy; do
	put "usr/sbin/xtables-$backend-multi"
	for action in '' -save -restore; do
		ln -s "xtables-$backend-multi" "$root/usr/sbin/iptables-$backend$action"
	done
done
for action in '' -save -restore; do
	ln -s "iptables-nft$action" "$root/usr/sbin/iptables$action"
done

# The output of update-ca-certificates, which would have to run inside the image.
cat "$unpacked"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
[ -s "$root/etc/ssl/certs/ca-certificates.crt" ] || fail "the package ca-certificates holds no certificates"

cat >"$root/etc/passwd" <<'END'
root:x:0:0:root:/:/sbin/nologin
nonroot:x:65532:65532:nonroot:/:/sbin/nologin
END
cat >"$root/etc/group" <<'END'
root:x:0:
nonroot:x:65532:
END
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"

# A missing library shows only when a program loads it, so run the programs if possible.
if [ "$arch" = "$native" ] && [ "$(id -u)" = 0 ]; then
	for backend in nft legacy; do
		chroot "$root" "/usr/sbin/iptables-$backend" --version >/dev/null ||
			fail "iptables-$backend does not run in the new root file system"
	done
fi

rm -rf "$dest"
chmod 755 "$root"
mv "$root" "$dest"
echo "rootfs.sh: $dest is ready, $(du -sk "$dest" | cut -f1) KiB, $arch"
