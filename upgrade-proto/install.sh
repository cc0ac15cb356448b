#!/bin/sh
# Installs the C library: header, shared and static library, pkg-config file.
#
#   cargo build --release -p upgrade-proto && upgrade-proto/install.sh [PREFIX [FROM]]
#
# PREFIX is /usr/local by default, FROM the folder with the built libraries (target/release).
# DESTDIR, if set, is put in front of all paths, as packagers need it. LIBDIR is where libraries are below PREFIX (lib).
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
prefix=${1:-/usr/local}
from=${2:-$here/../target/release}
to=${DESTDIR:-}$prefix

version=$(sed -n 's/^#define UPGRADE_PROTO_VERSION "\(.*\)"$/\1/p' "$here/include/upgrade_proto.h")
library=libupgrade_proto

lib=${LIBDIR:-lib}

mkdir -p "$to/include" "$to/$lib/pkgconfig"
install -m 644 "$here/include/upgrade_proto.h" "$to/include/"
install -m 755 "$from/$library.so" "$to/$lib/$library.so.$version"
ln -sf "$library.so.$version" "$to/$lib/$library.so.${version%%.*}"
ln -sf "$library.so.${version%%.*}" "$to/$lib/$library.so"
install -m 644 "$from/$library.a" "$to/$lib/"
sed -e "s|@PREFIX@|$prefix|" -e "s|@LIBDIR@|$lib|" -e "s|@VERSION@|$version|" "$here/upgrade_proto.pc.in" \
    >"$to/$lib/pkgconfig/upgrade_proto.pc"
