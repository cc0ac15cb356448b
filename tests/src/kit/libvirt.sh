# A host of libvirt: namespaces whose files are this machine's, with libvirt's packages in a layer above them that goes
# away with them. `libvirt.sh PACKAGES RUN SERVERS SHARED`: the unpacked packages, the directory that is /run in there,
# the servers' runtime directory (/run/ublkup), and one that all hosts have (/run/shared). Runs libvirtd.
set -e
mount --make-rprivate /
layer=$(mktemp -d)
mount -t tmpfs -o mode=755 layer "$layer"
mkdir "$layer/upper" "$layer/work" "$layer/root"
chmod 755 "$layer/upper"
cp -a "$1/." "$layer/upper/"
mount -t overlay -o "lowerdir=/,upperdir=$layer/upper,workdir=$layer/work" overlay "$layer/root"

# The user and the groups that the packages make when they are installed, with numbers that are known outside.
root=$layer/root
sed -i '/^\(libvirt-qemu\|libvirt\|kvm\):/d' "$root/etc/passwd" "$root/etc/group"
echo "libvirt-qemu:x:64055:64057::/var/lib/libvirt:/usr/sbin/nologin" >>"$root/etc/passwd"
printf '%s\n' "libvirt-qemu:x:64055:" "libvirt:x:64056:" "kvm:x:64057:" >>"$root/etc/group"
# libvirtd refuses to move a guest to the host that it is on.
echo "host_uuid = \"$(cat /proc/sys/kernel/random/uuid)\"" >>"$root/etc/libvirt/libvirtd.conf"

mount --bind "$2" "$root/run"
mkdir -p "$root/run/ublkup" "$root/run/shared" "$root/run/libvirt"
mount --bind "$3" "$root/run/ublkup"
mount --bind "$4" "$root/run/shared"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs tmp "$root/tmp"
mount -t tmpfs -o mode=755 dev "$root/dev"
for node in null zero full random urandom tty; do
        cp -a "/dev/$node" "$root/dev/"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 pts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs shm "$root/dev/shm"

cd "$root"
mkdir outside
pivot_root . outside
umount -l outside
ip link set lo up
virtlogd --daemon
# Not exec: the first process of the namespace has to collect what QEMU leaves behind.
libvirtd
