#!/bin/sh
# Runs at each boot of a Debian whose /data is an export; boots.rs reads what it prints.

# Numbers are appended to /data/log. One is noted in /srv/acked, on another disk, when fsync(2) of the log said that it is
# there.
log=$(tail -n 1 /data/log 2>/dev/null)
acked=$(cat /srv/acked 2>/dev/null)
log=${log:-0} acked=${acked:-0}
if [ "$log" -ge "$acked" ]; then echo CHECK-OK; else echo "CHECK-LOST log $log acknowledged $acked"; fi
[ -e "/dev/disk/by-uuid/$(findmnt -n -o UUID /data)" ] && echo LINK-OK

write() {
    i=$log
    while i=$((i + 1)) && echo $i >>/data/log && sync /data/log; do
        echo $i >/srv/acked
        sync /srv/acked
    done
    echo WRITER-FAILED
}
write &

goes_on() {
    before=$(cat /srv/acked)
    for _ in $(seq 100); do
        [ "$(cat /srv/acked)" -gt $((before + 5)) ] && echo "GOES-ON $*" && return
        sleep 0.2
    done
    echo "STUCK $*"
}

systemctl restart ublkup
echo "RESTARTED $?"
goes_on after restart
old=$(systemctl show -P MainPID ublkup)
kill -9 "$old"
# systemd has to notice first.
while [ "$(systemctl show -P MainPID ublkup)" = "$old" ]; do sleep 0.1; done
goes_on after kill
# In use: the device waits for the next server.
systemctl stop ublkup
systemctl start ublkup
goes_on after stop
# Nothing in fstab says where this one stands in the order of the shutdown.
mount --bind /data /manual
echo "WRITTEN $(cat /srv/acked)"
systemctl poweroff
wait
