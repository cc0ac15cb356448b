#!/bin/sh
# A PC (q35) with two upgraded disks, which boots from the second, on memory from a file in /dev/shm
# (a mount of hugetlbfs serves as well).
#
#   SYSTEM=/dev/ublkb1 DATA=/dev/ublkb0 MEMORY=4G qemu-config/several-disks.sh [more options]
set -eu
: "${SYSTEM:=/dev/ublkb1}" "${DATA:=/dev/ublkb0}" "${MEMORY:=1G}" "${SHARED:=/dev/shm}"
exec ublkup qemu "$DATA,id=data" "$SYSTEM,id=system,bootindex=1,num-queues=1" -- \
    qemu-system-x86_64 -m "$MEMORY" \
    -object memory-backend-file,id=ram,size="$MEMORY",mem-path="$SHARED",share=on \
    -machine q35,memory-backend=ram "$@"
