# Runs a command in a tree of files as a pod of Kubernetes' restricted profile would: user 1000 without capabilities, a
# read-only root, volumes for /tmp, the home and /dev/shm, namespaces of its own, and a network that ends at itself.
# unshare ... bash pod.sh ROOT NAME=VALUE... COMMAND...
set -euo pipefail
root=$1
shift
ip link set lo up
hostname pod
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=0700,uid=1000,gid=1000 tmpfs "$root/home/isthmus"
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size=1g tmpfs "$root/dev/shm"
mount -o remount,ro "$root/dev"
cd "$root"
exec chroot "$root" /usr/bin/setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all /usr/bin/env -i "$@"
