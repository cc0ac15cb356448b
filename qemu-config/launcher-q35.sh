#!/bin/sh
# A PC (q35) that boots from an upgraded disk, through the launcher: on any kernel, with a claim on
# the block device, and with the block device itself where there is no service.
#
#   DEVICE=/dev/ublkb0 MEMORY=4G qemu-config/launcher-q35.sh [more of QEMU's options]
set -eu
: "${DEVICE:=/dev/ublkb0}" "${MEMORY:=1G}"
exec ublkup qemu "$DEVICE,id=disk,bootindex=1" -- \
    qemu-system-x86_64 -machine q35 -m "$MEMORY" "$@"
