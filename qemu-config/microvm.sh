#!/bin/sh
# A microvm whose disk is an export of ublkup, over vhost-user-blk.
#
#   SOCKET=/run/ublkup/exports/disk/vhost-user-blk MEMORY=1G qemu-config/microvm.sh -kernel … -append …
#
# Why each option is there: qemu-config/README.md. Add `-accel kvm -cpu host` where there is KVM.
set -eu
: "${SOCKET:=/run/ublkup/exports/disk/vhost-user-blk}" "${MEMORY:=1G}"
exec qemu-system-x86_64 \
    -m "$MEMORY" \
    -object memory-backend-memfd,id=guest-memory,size="$MEMORY",share=on \
    -machine microvm,memory-backend=guest-memory,rtc=on \
    -global virtio-mmio.force-legacy=false \
    -chardev socket,id=disk,path="$SOCKET",reconnect-ms=10 \
    -device vhost-user-blk,chardev=disk \
    "$@"
