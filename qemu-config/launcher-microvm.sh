#!/bin/sh
# A microvm with an upgraded disk, through the launcher.
#
#   DEVICE=/dev/ublkb0 MEMORY=1G qemu-config/launcher-microvm.sh -kernel … -append …
set -eu
: "${DEVICE:=/dev/ublkb0}" "${MEMORY:=1G}"
exec ublkup qemu "$DEVICE" -- \
    qemu-system-x86_64 -machine microvm,rtc=on -m "$MEMORY" "$@"
