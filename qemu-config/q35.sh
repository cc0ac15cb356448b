#!/bin/sh
# A PC (q35) whose disk is an export of ublkup, over vhost-user-blk.
#
#   SOCKET=/run/ublkup/exports/disk/vhost-user-blk MEMORY=4G qemu-config/q35.sh [more of QEMU's options]
#
# Why each option is there: qemu-config/README.md. Add `-accel kvm -cpu host` where there is KVM.
set -eu
: "${SOCKET:=/run/ublkup/exports/disk/vhost-user-blk}" "${MEMORY:=1G}"
exec qemu-system-x86_64 \
    -m "$MEMORY" \
    -object memory-backend-memfd,id=guest-memory,size="$MEMORY",share=on \
    -machine q35,memory-backend=guest-memory \
    -chardev socket,id=disk,path="$SOCKET",reconnect-ms=10 \
    -device vhost-user-blk-pci,chardev=disk \
    "$@"
