#!/bin/busybox sh
# The appliance's first program: finds the layers of a release, mounts them and hands over to systemd.
#
# Words on the kernel command line:
#   samepage.mode=live|installed     where the layers are: on the medium labelled SAMEPAGE or on the state partition
#   samepage.release=VERSION         which release to boot
#   samepage.state=UUID              installed: the state partition (default: the one labelled SAMEPAGE-STATE)
#   samepage.data=N                  installed: the data subvolume that becomes /var
#   samepage.install=interactive|auto  run the installer before anything else
#   samepage.after=reboot|poweroff   what follows a finished installation
#   samepage.onfail=wait|poweroff    what follows a failed one (default: the message stays until somebody presses Enter)
#   samepage.wait=SECONDS            how long the medium or the disk may take to appear (default 60)
#   samepage.trial=SECONDS           a release that is tried: the machine restarts unless it is found good in that time
#   samepage.debug                   trace this script, and give a shell where it fails

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs -o mode=0755,nosuid dev /dev
mount -t tmpfs -o mode=0755,nosuid,nodev,size=20%,nr_inodes=800k tmpfs /run
mkdir -p /run/samepage/config /run/samepage/packed /run/credentials/@initrd
chmod 0700 /run/credentials /run/credentials/@initrd

mode='' release='' state='' data=1 install='' after=reboot onfail=wait wait=60 trial='' debug=''
read -r cmdline </proc/cmdline
for word in $cmdline; do
    value=${word#*=}
    case $word in
        samepage.mode=*) mode=$value ;;
        samepage.release=*) release=$value ;;
        samepage.state=*) state=$value ;;
        samepage.data=*) data=$value ;;
        samepage.install=*) install=$value ;;
        samepage.after=*) after=$value ;;
        samepage.onfail=*) onfail=$value ;;
        samepage.wait=*) wait=$value ;;
        samepage.trial=*) trial=$value ;;
        samepage.debug) debug=yes; set -x ;;
    esac
done

# --- reporting --------------------------------------------------------------------------------------------------

note() { echo "<6>samepage: $*" >/dev/kmsg; }
alert() { echo "<1>samepage: $*" >/dev/kmsg; } # severe enough for every console, whatever the log level

halt_with() {
    alert "$*"
    [ -n "$debug" ] && setsid cttyhack sh
    alert 'The appliance cannot start; switch it off or restart it.'
    while :; do sleep 3600; done
}

# --- devices ----------------------------------------------------------------------------------------------------

known=''
load_drivers() { # for every device on a bus that can carry a disk or a keyboard; cheap when nothing is new
    local found
    found=$(cat /sys/bus/pci/devices/*/modalias /sys/bus/virtio/devices/*/modalias /sys/bus/scsi/devices/*/modalias \
        /sys/bus/vmbus/devices/*/modalias /sys/bus/usb/devices/*/modalias /sys/bus/hid/devices/*/modalias 2>/dev/null)
    [ "$found" = "$known" ] && return
    known=$found
    modprobe -qab $found
}

device=''
find_device() { # find_device LABEL=... | UUID=...: sets $device, waits for it until the deadline
    local now
    while :; do
        load_drivers
        device=$(findfs "$1" 2>/dev/null) && return 0
        read -r now _ </proc/uptime
        [ "${now%.*}" -lt "$wait" ] || return 1
        sleep 0.1
    done
}

settle() { # until nothing new has come for 4 s: an installer must see the disks that are slow to appear
    local calm=0 before
    while [ $calm -lt 8 ]; do
        before="$known $(echo /sys/block/*)"
        sleep 0.5
        load_drivers
        calm=$((calm + 1))
        [ "$before" = "$known $(echo /sys/block/*)" ] || calm=0
    done
}

attach_image() { # attach_image FILE FOLDER: a loop device only where the kernel cannot mount the file itself
    file_mount -t erofs -o ro "$1" "$2" 2>/dev/null || mount -t erofs -o ro,loop "$1" "$2"
}

take_credentials() { # take_credentials FOLDER: systemd imports what stands in @initrd
    local file name
    for file in "$1"/*.cred; do
        [ -f "$file" ] || continue
        name=${file##*/}
        cat "$file" >"/run/credentials/@initrd/${name%.cred}"
    done
    chmod 0400 /run/credentials/@initrd/* 2>/dev/null
}

read_config_drive() {
    device=$(findfs LABEL=SAMEPAGECFG 2>/dev/null) || return
    modprobe -qab vfat nls_ascii nls_cp437 isofs
    mkdir /drive
    if mount -t vfat -o ro "$device" /drive 2>/dev/null || mount -t iso9660 -o ro "$device" /drive; then
        note "credentials from the config drive $device"
        take_credentials /drive
        umount /drive
    else
        alert "the config drive $device cannot be read; going on without it"
    fi
    rmdir /drive
}

# --- the release ------------------------------------------------------------------------------------------------

store=''
layer_file() { # layer_file KIND: its image on the state partition, or inside the squashfs on the medium
    local kind digest
    while read -r kind digest; do
        [ "$kind" = "$1" ] || continue
        if [ "$mode" = installed ]; then
            echo "$store/layers/$kind-$digest.erofs"
        else
            mkdir -p "/run/samepage/packed/$kind"
            mount -t squashfs -o ro,loop "$store/layers/$kind-$digest.squashfs" "/run/samepage/packed/$kind" &&
                echo "/run/samepage/packed/$kind/$kind-$digest.erofs"
        fi
        return
    done <"$store/releases/$release/layers"
}

mount_layers() {
    [ -s "$store/releases/$release/layers" ] && [ -s "$store/releases/$release/release.json" ] &&
        attach_image "$(layer_file base)" /sysroot &&
        attach_image "$(layer_file app)" /sysroot/opt/samepage &&
        attach_image "$(layer_file config)" /run/samepage/config
}

return_to_previous() { # the record of the chosen release is broken: choose the last good one and start again
    local boot=/mnt/boot
    if [ -n "$trial" ]; then # it was never chosen
        alert "release $release cannot be read; restarting with the one that is chosen"
        umount -r /mnt
        reboot -f
    fi
    if [ -s $boot/previous.cfg ] && ! grep -q "'$release'" $boot/previous.cfg && [ -d /mnt/releases ]; then
        alert "release $release cannot be read; restarting with the release before it"
        cp $boot/previous.cfg $boot/selected.new && sync && mv $boot/selected.new $boot/selected.cfg && sync
        umount -r /mnt
        reboot -f
    fi
    halt_with "release $release cannot be read and there is no good release before it"
}

make_machine_id() {
    local folder=/mnt/identity/etc
    [ -s $folder/machine-id ] && return
    mkdir -p $folder
    chmod 0711 /mnt/identity # services pass through to folders of their own
    head -c 16 /dev/random | hexdump -e '16/1 "%02x" "\n"' >$folder/machine-id.new
    chmod 0444 $folder/machine-id.new
    sync
    mv $folder/machine-id.new $folder/machine-id
}

begin_trial() { # begin_trial SECONDS: whoever finds the release good switches the watchdog off
    local dog
    echo "$1" >/run/samepage/trial
    modprobe softdog soft_margin="$1" nowayout=0
    for dog in /sys/class/watchdog/*; do
        if [ "$(cat "$dog/identity")" = 'Software Watchdog' ]; then
            echo . >"/dev/${dog##*/}"
        fi
    done
}

# Where the layers are. Drivers of devices load beside the ones that every boot needs.
case $mode in
    live)
        modprobe -ab loop isofs squashfs erofs overlay sr_mod sd_mod &
        find_device LABEL=SAMEPAGE || halt_with "no medium labelled SAMEPAGE within $wait s"
        mkdir /run/samepage/medium
        wait
        mount -t iso9660 -o ro "$device" /run/samepage/medium || halt_with "the medium $device cannot be read"
        store=/run/samepage/medium/samepage
        mount -t tmpfs -o mode=0755,nosuid,nodev,size=60% state /mnt
        mkdir -p "/mnt/data/$data"
        ;;
    installed)
        modprobe -ab crc32c_intel btrfs erofs overlay sd_mod &
        find_device "${state:+UUID=}${state:-LABEL=SAMEPAGE-STATE}" ||
            halt_with "no disk with the state partition ${state:-SAMEPAGE-STATE} within $wait s"
        wait
        mount -t btrfs -o noatime,subvolid=5 "$device" /mnt || halt_with "the state partition $device cannot be read"
        store=/mnt
        ;;
    *)
        halt_with "the kernel command line has samepage.mode='$mode', expected live or installed"
        ;;
esac
note "$mode release $release from $device"
[ -n "$trial" ] && begin_trial "$trial"
source=$device
take_credentials /mnt/identity/credentials
read_config_drive

# The file system, from the layers up.
if ! mount_layers; then
    [ "$mode" = installed ] && return_to_previous
    halt_with "the medium $source does not hold a good release $release"
fi
make_machine_id
mount -t overlay -o "ro,xino=off,lowerdir=/mnt/identity/etc:/run/samepage/config/etc:/sysroot/etc" etc /sysroot/etc ||
    halt_with '/etc cannot be mounted'
if [ "$mode" = live ]; then
    mount --bind "/mnt/data/$data" /sysroot/var
else
    mount -t btrfs -o "noatime,nosuid,nodev,subvol=data/$data" "$source" /sysroot/var
fi || halt_with "the data subvolume $data cannot be mounted"
cp "$store/releases/$release/release.json" /run/samepage/release.json
echo "$mode" >/run/samepage/mode
mount --move /mnt /sysroot/state
if [ -n "$install" ]; then
    modprobe -qab btrfs crc32c_intel # the kernel cannot ask for them once /proc has moved
    settle
fi
for folder in dev proc sys run; do mount --move /$folder /sysroot/$folder; done

if [ -n "$install" ]; then
    if chroot /sysroot /opt/samepage/bin/samepage-install --boot; then
        [ "$after" = poweroff ] && poweroff -f
        reboot -f
    fi
    [ "$onfail" = poweroff ] && poweroff -f
fi

exec switch_root /sysroot /usr/lib/systemd/systemd
