#!/bin/bash
# Two hosts on this machine: network namespaces with host names and session directories of their own, joined
# by a virtual cable. mpirun on the first starts ranks on both and they talk over TCP.
#   two_hosts.sh FOLDER COMMAND...     runs COMMAND on host simpo-a; in it, FOLDER/agent starts things on simpo-b.
# Afterwards FOLDER/bytes holds what simpo-a has sent over the cable. Nothing is left: everything lives in a
# mount namespace that ends with the script.
set -euo pipefail
if [ "${SIMPO_TWO_HOSTS:-}" != inside ]; then
  as_root=(--user --map-root-user)
  [ "$(id -u)" = 0 ] && as_root=()
  SIMPO_TWO_HOSTS=inside exec unshare "${as_root[@]}" --mount --net "$0" "$@"
fi
folder=$1
shift
mkdir -p "$folder/simpo-a" "$folder/simpo-b"
mount -t tmpfs tmpfs /run
printf '127.0.0.1 localhost\n10.77.0.1 simpo-a\n10.77.0.2 simpo-b\n' > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
ip netns add simpo-a
ip netns add simpo-b
ip link add cable netns simpo-a type veth peer name cable netns simpo-b
number=0
for host in simpo-a simpo-b; do
  number=$((number + 1))
  ip -n "$host" addr add "10.77.0.$number/24" dev cable
  ip -n "$host" link set cable up
  ip -n "$host" link set lo up
done
# As ssh: HOST COMMAND...
cat > "$folder/agent" <<AGENT
#!/bin/bash
host=\$1
shift
export TMPDIR="$folder/\$host"
exec ip netns exec "\$host" unshare --uts bash -c 'hostname "\$0"; eval "\$@"' "\$host" "\$*"
AGENT
chmod +x "$folder/agent"
code=0
TMPDIR="$folder/simpo-a" ip netns exec simpo-a unshare --uts bash -c 'hostname simpo-a; exec "$@"' bash "$@" || code=$?
ip netns exec simpo-a cat /sys/class/net/cable/statistics/tx_bytes > "$folder/bytes"
exit $code
