#!/bin/sh
# Run inside a mount namespace of its own: makes the tree $1 the root, with the folder $2 at /bench, and runs the rest.
# A chroot would not do, as user namespaces cannot be made in one.
set -e
tree=$1 work=$2
shift 2
mount --make-rprivate /
mount --bind "$tree" "$tree"
mkdir -p "$tree/bench"
mount --bind "$work" "$tree/bench"
mount --rbind /dev "$tree/dev"
mount --rbind /sys "$tree/sys"
mount -t proc proc "$tree/proc"
mount -t tmpfs tmpfs "$tree/run"
mount -t tmpfs tmpfs "$tree/tmp"
cp /etc/resolv.conf "$tree/run/resolv.conf"
cd "$tree"
pivot_root . mnt
cd /bench
umount -l /mnt
exec "$@"
