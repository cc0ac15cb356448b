#!/bin/sh
# A PC (q35) that upgrades by itself: QEMU finds the server through the block device's descriptor.
# For kernels with fd addresses; nothing but the path of the block device is known.
#
#   DEVICE=/dev/ublkb0 MEMORY=4G qemu-config/raw.sh [more of QEMU's options]
#
# Without a service QEMU waits for one. RECONNECT= makes it end at once instead, but then it does not
# come back to a server that was restarted either.
#
# Unlike the launcher (launcher-q35.sh) this takes no claim: see "The raw recipe" in README.md.
set -eu
: "${DEVICE:=/dev/ublkb0}" "${MEMORY:=1G}" "${RECONNECT=,reconnect-ms=10}"
blockdev --flushbufs "$DEVICE"
exec qemu-system-x86_64 \
    -m "$MEMORY" \
    -object memory-backend-memfd,id=guest-memory,size="$MEMORY",share=on \
    -machine q35,memory-backend=guest-memory \
    -chardev socket,id=disk,path=/dev/self/fd/9/vhost-user-blk"$RECONNECT" \
    -device vhost-user-blk-pci,chardev=disk,bootindex=1 \
    "$@" 9<>"$DEVICE"
