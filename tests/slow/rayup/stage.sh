# stage.sh FOLDER PYTHON ROOT: runs `PYTHON -m tests.slow.rayup.up FOLDER` on a stage of its own.
# Start it in fresh namespaces of processes, network and mounts, so that everything ends with them.
set -eu
folder=$1 python=$2 root=$3
bin=$(dirname "$python")

# A /tmp of its own, for Ray's sockets and files; required files of the old one stay available.
mount -t tmpfs tmpfs /mnt
for kept in "$folder" "$root" "$(dirname "$bin")"; do
    case $kept in /tmp/*)
        mkdir -p "/mnt/${kept#/tmp/}"
        mount --bind "$kept" "/mnt/${kept#/tmp/}" ;;
    esac
done
mount --move /mnt /tmp
chmod 1777 /tmp
mount -t tmpfs tmpfs /run

# Every address is this machine, so that the addresses of the stand-in cloud lead to our sshd.
ip link set lo up
ip address add 10.77.0.1/32 dev lo
ip route add local 0.0.0.0/1 dev lo
ip route add local 128.0.0.0/2 dev lo
ip route add default dev lo src 10.77.0.1

# The nodes' user, who is root here, and whose home all nodes share.
mount -t tmpfs tmpfs /home
mkdir -p -m 700 /home/ubuntu /home/ubuntu/.ssh "$folder/laptop" "$folder/laptop/.ssh" /run/sshd
{
    grep -v -e '^ubuntu:' -e '^sshd:' /etc/passwd
    echo 'sshd:x:110:65534::/run/sshd:/usr/sbin/nologin'
} > "$folder/passwd.others"
{ echo 'ubuntu:x:0:0::/home/ubuntu:/bin/bash'; cat "$folder/passwd.others"; } > "$folder/passwd"
mount --bind "$folder/passwd" /etc/passwd

# The packages that the setup commands would install, from this machine: there is no network.
ln -s "$(dirname "$bin")" /home/ubuntu/venv
export AWS_ENDPOINT_URL=http://127.0.0.1:5000 AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret
export AWS_DEFAULT_REGION=us-west-2 AWS_EC2_METADATA_DISABLED=true RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
{
    echo "export PATH=$PATH"
    export -p | grep -E ' (AWS_|OMP_|RAY_USAGE)'
} > /home/ubuntu/.bashrc

key=$folder/laptop/.ssh/ray-autoscaler_us-west-2.pem # where Ray keeps the one that it makes
ssh-keygen -q -t ed25519 -N '' -f "$folder/hostkey"
ssh-keygen -q -t rsa -b 2048 -m PEM -N '' -f "$key"
cp "$key.pub" /home/ubuntu/.ssh/authorized_keys
cat > "$folder/sshd.conf" <<C
HostKey $folder/hostkey
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
C
"$(command -v sshd)" -D -e -f "$folder/sshd.conf" > "$folder/sshd.log" 2>&1 &

export HOME=$folder/laptop PATH=$bin:$PATH
unset RAY_ADDRESS RAY_AUTH_MODE RAY_AUTH_TOKEN
cd "$root"
"$python" -m tests.slow.rayup.up "$folder"
