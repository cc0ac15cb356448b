#!/bin/sh
# Installs everything but the configuration of a distribution's package: programs, C library, man pages, completions,
# units, udev rules, documents.
#
#   cargo build --release -p ublkup -p upgrade-proto && DESTDIR=/tmp/tree server/package/install.sh [FROM]
#
# FROM is the folder with the built programs and libraries (target/release). LIBDIR (lib) is where the distribution has
# libraries below /usr, like lib/x86_64-linux-gnu or lib64; ZSHDIR where zsh looks for completions of packages.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
top=$here/../..
from=${1:-$top/target/release}
to=${DESTDIR:-}

put() { # MODE TARGET FILE…
    mode=$1 target=$2
    shift 2
    mkdir -p "$to$target"
    install -m "$mode" "$@" "$to$target"
}

put 755 /usr/bin "$from/ublkup"
put 755 /usr/lib/ublkup "$here/systemd/service-stop"
put 644 /usr/lib/systemd/system "$here"/systemd/ublkup*
put 644 /usr/lib/udev/rules.d "$here"/udev/*.rules
put 644 /etc/ublkup "$here/etc/ublkup.toml"
mkdir -p "$to/usr/lib/sysusers.d" "$to/usr/lib/modules-load.d" "$to/etc/apparmor.d/abstractions/libvirt-qemu.d"
install -m 644 "$here/etc/sysusers.conf" "$to/usr/lib/sysusers.d/ublkup.conf"
install -m 644 "$here/etc/modules-load.conf" "$to/usr/lib/modules-load.d/ublkup.conf"
install -m 644 "$here/etc/apparmor-libvirt-qemu" "$to/etc/apparmor.d/abstractions/libvirt-qemu.d/ublkup"

DESTDIR=$to LIBDIR=${LIBDIR:-lib} "$top/upgrade-proto/install.sh" /usr "$from"

pages=$(mktemp -d)
trap 'rm -r "$pages"' EXIT
"$from/ublkup" man "$pages"
for page in "$pages"/*; do
    gzip -9n "$page"
    put 644 "/usr/share/man/man${page##*.}" "$page.gz"
done
completions=/usr/share/bash-completion/completions
zsh=${ZSHDIR:-/usr/share/zsh/site-functions}
mkdir -p "$to$completions" "$to$zsh" "$to/usr/share/fish/vendor_completions.d"
"$from/ublkup" completions bash >"$to$completions/ublkup"
"$from/ublkup" completions zsh >"$to$zsh/_ublkup"
"$from/ublkup" completions fish >"$to/usr/share/fish/vendor_completions.d/ublkup.fish"

doc=/usr/share/doc/ublkup
put 644 $doc "$top/README.md" "$top/docs/CHANGELOG.md" "$top/LICENSE-APACHE" "$top/LICENSE-MIT"
for page in getting-started operations metrics admin recovery sandbox troubleshooting reference export-options upgrade; do
    put 644 $doc "$top/docs/$page.md"
done
put 644 $doc/examples "$top"/qemu-config/* "$here"/grafana/ublkup.json
