#!/bin/sh
# A PC (q35) whose guest can move to another QEMU while it runs, and its disk with it. The disk is an
# export that is served with `--migration`.
#
#   SOCKET=/run/ublkup/exports/disk/vhost-user-blk QMP=/run/source.qmp MEMORY=4G \
#       qemu-config/migration-source.sh [more of QEMU's options]
#
# When migration-target.sh waits, started with the same options, say here (QMP, after qmp_capabilities):
#
#   { "execute": "migrate", "arguments": { "uri": "unix:/run/moving" } }
#
# and `quit` when query-migrate says that it is completed.
set -eu
: "${SOCKET:=/run/ublkup/exports/disk/vhost-user-blk}" "${QMP:=/run/source.qmp}" "${MEMORY:=1G}"
exec qemu-system-x86_64 \
    -m "$MEMORY" \
    -object memory-backend-memfd,id=guest-memory,size="$MEMORY",share=on \
    -machine q35,memory-backend=guest-memory \
    -chardev socket,id=disk,path="$SOCKET",reconnect-ms=10 \
    -device vhost-user-blk-pci,chardev=disk \
    -qmp unix:"$QMP",server=on,wait=off \
    "$@"
