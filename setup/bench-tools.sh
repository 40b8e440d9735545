#!/usr/bin/env bash
# What the transport bench compares Dhow with: an ssh client and iperf3 on this machine, and a root with sshd and
# iperf3 for a container in the guest, in build/bench/tools.tar.
set -euo pipefail
cd "$(dirname "$0")/.."
source setup/lib.sh
missing=()
command -v ssh >/dev/null || missing+=(openssh-client)
command -v iperf3 >/dev/null || missing+=(iperf3)
if [[ ${#missing[@]} -gt 0 ]]; then
    lists
    apt install -y --no-install-recommends "${missing[@]}"
fi
[[ -e build/bench/tools.tar ]] && exit 0
mkdir -p build/bench
IMAGE_OUT=$PWD/build/bench
source image/lib.sh
debian "$IMAGE_OUT/tools.tar.new" --variant=essential --include=openssh-server,iperf3
mv "$IMAGE_OUT/tools.tar.new" "$IMAGE_OUT/tools.tar"
