#!/bin/sh
# Runs tests on an emulated arm64: sh tests/arm64.sh FOLDER tests/test_kernels.py ...
#
# FOLDER gets a Debian for arm64 with what the tests need, and this checkout as it was committed; a second run finds them there.
# Needs root, about 6 GB, and on Debian: apt-get install debootstrap qemu-user-static binfmt-support. Emulated, everything is
# ten to thirty times slower. PyPI's torch for arm64 is a CUDA build; PIP_EXTRA_INDEX_URL may name an index with a smaller one.
set -eu
root=$1
shift
here=$(cd "$(dirname "$0")/.." && pwd)
mounted=
trap 'for place in $mounted; do umount -l "$root/$place"; done' EXIT
mount_at() { mount $1 "$root/$2" && mounted="$2 $mounted"; }

if [ ! -e "$root/opt/ready" ]; then
  debootstrap --arch=arm64 --variant=minbase --include=python3-dev,gcc,libc6-dev bookworm "$root"
  platforms=$(seq -f "--platform manylinux_2_%.0f_aarch64" 5 36)
  "${PYTHON:-python3.11}" -m pip install --quiet --target "$root/opt/packages" $platforms --platform manylinux2014_aarch64 \
    --python-version 3.11 --only-binary :all: -c "$here/constraints.txt" \
    torch transformers typer rich pytest hypothesis numpy 'setuptools>=77'
  # What torch wants to know of a CPU, and the emulator shows the host's instead.
  for core in 0 1; do
    mkdir -p "$root/opt/sys/devices/system/cpu/cpu$core"
    printf 'processor: %s\nFeatures: fp asimd aes crc32 atomics fphp asimdhp asimddp\nCPU implementer: 0x41\n' $core
    printf 'CPU architecture: 8\nCPU variant: 0x3\nCPU part: 0xd0c\nCPU revision: 1\n\n'
  done > "$root/opt/cpuinfo"
  for kind in possible present online; do echo 0-1 > "$root/opt/sys/devices/system/cpu/$kind"; done
  touch "$root/opt/ready"
fi
rm -rf "$root/opt/simba"
git clone --quiet "$here" "$root/opt/simba"
mount_at "-t proc proc" proc
mount_at "--bind $root/opt/cpuinfo" proc/cpuinfo
mount_at "--bind $root/opt/sys" sys
mount_at "--bind /dev" dev
export QEMU_CPU=neoverse-n1 PYTHONPATH=/opt/packages:/opt/simba LC_ALL=C
chroot "$root" sh -c 'cd /opt/simba && python3 setup.py --quiet egg_info build_ext --inplace'
chroot "$root" sh -c 'cd /opt/simba && python3 -m pytest -p no:xdist -o addopts= -q "$@"' sh "$@"
