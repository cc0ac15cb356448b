#!/bin/sh
# Moves the disk of a running guest (block-device.sh) from the block device to the server behind it.
# The guest must have unmounted it; it sees the disk go and come back.
#
#   QMP=/run/guest.qmp DISK=disk qemu-config/live.sh
set -eu
: "${QMP:=/run/guest.qmp}" "${DISK:=disk}"
exec ublkup qemu --live "$QMP" "$DISK"
