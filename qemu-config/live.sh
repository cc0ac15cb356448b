#!/bin/sh
# Moves the disk of a running guest (block-device.sh) from the block device to the server behind it.
# The guest sees it go and come back, and must have unmounted it: that is what --unmounted says.
#
#   QMP=/run/guest.qmp DISK=disk qemu-config/live.sh --unmounted
#   QMP=/run/guest.qmp DISK=disk qemu-config/live.sh --unmounted --back     # to the block device again
set -eu
: "${QMP:=/run/guest.qmp}" "${DISK:=disk}"
exec ublkup qemu --live "$QMP" "$DISK" "$@"
