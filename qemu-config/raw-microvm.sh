#!/bin/sh
# A microvm that upgrades by itself: as raw.sh, on QEMU's small machine.
#
#   DEVICE=/dev/ublkb0 MEMORY=1G qemu-config/raw-microvm.sh -kernel … -append …
set -eu
: "${DEVICE:=/dev/ublkb0}" "${MEMORY:=1G}" "${RECONNECT=,reconnect-ms=10}"
blockdev --flushbufs "$DEVICE"
exec qemu-system-x86_64 \
    -m "$MEMORY" \
    -object memory-backend-memfd,id=guest-memory,size="$MEMORY",share=on \
    -machine microvm,memory-backend=guest-memory,rtc=on \
    -global virtio-mmio.force-legacy=false \
    -chardev socket,id=disk,path=/dev/self/fd/9/vhost-user-blk"$RECONNECT" \
    -device vhost-user-blk,chardev=disk \
    "$@" 9<>"$DEVICE"
