#!/bin/sh
# A PC (q35) on the block device itself: what a kernel without fd addresses and a server without
# registry leave, and the start of an upgrade of the running guest (live.sh). The disk is on a root
# port, because the root bus cannot be hot-plugged; the memory is shared, because that cannot be
# changed later.
#
#   DEVICE=/dev/ublkb0 MEMORY=4G QMP=/run/guest.qmp qemu-config/block-device.sh [more options]
set -eu
: "${DEVICE:=/dev/ublkb0}" "${MEMORY:=1G}" "${QMP:=/run/guest.qmp}"
exec qemu-system-x86_64 \
    -m "$MEMORY" \
    -object memory-backend-memfd,id=guest-memory,size="$MEMORY",share=on \
    -machine q35,memory-backend=guest-memory \
    -qmp unix:"$QMP",server=on,wait=off \
    -device pcie-root-port,id=port0,chassis=1 \
    -blockdev driver=host_device,node-name=disk-node,filename="$DEVICE",cache.direct=on,aio=io_uring \
    -device virtio-blk-pci,bus=port0,id=disk,drive=disk-node \
    "$@"
