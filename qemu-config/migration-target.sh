#!/bin/sh
# The QEMU to which the guest of migration-source.sh moves: the same machine, which waits for a guest.
#
#   SOCKET=/run/ublkup/exports/disk/vhost-user-blk FROM=unix:/run/moving QMP=/run/target.qmp MEMORY=4G \
#       qemu-config/migration-target.sh [the same options as the source's]
#
# SOCKET is the source's, to move to another QEMU of the same server; or one of another server of the same
# file. On another machine: FROM=tcp:0:4444, and `migrate` to tcp:MACHINE:4444. With multifd: FROM=defer, then
# migrate-set-capabilities on both sides, and migrate-incoming here.
set -eu
: "${SOCKET:=/run/ublkup/exports/disk/vhost-user-blk}" "${QMP:=/run/target.qmp}" "${MEMORY:=1G}"
exec qemu-system-x86_64 \
    -m "$MEMORY" \
    -object memory-backend-memfd,id=guest-memory,size="$MEMORY",share=on \
    -machine q35,memory-backend=guest-memory \
    -chardev socket,id=disk,path="$SOCKET",reconnect-ms=10 \
    -device vhost-user-blk-pci,chardev=disk \
    -qmp unix:"$QMP",server=on,wait=off \
    -incoming "${FROM:=unix:/run/moving}" \
    "$@"
