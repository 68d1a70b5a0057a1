# An OCI layout `oci` with the image `app`, made by umoci: three layers with all that a layer can hold.
# Without root, what needs root is left out.
rootless= root=
if [ "$(id -u)" = 0 ]; then root=1; else rootless=--rootless; fi
# shellcheck disable=SC2086
unpack() { umoci unpack $rootless --image oci:app "$1" >/dev/null 2>&1; }
pack() { umoci repack --image oci:app "$1" >/dev/null 2>&1; chmod -R u+rwx "$1" && rm -rf "$1"; }

umoci init --layout oci
umoci new --image oci:app

unpack one
cd one/rootfs
mkdir -p usr/share/deep/er etc tmp gone opaque
echo hello >etc/a
ln etc/a etc/hard
ln -s ../etc/a usr/link
head -c 3000000 /dev/urandom >usr/big
head -c 3000 /dev/zero >usr/zeros
: >usr/empty
head -c 4096 /dev/zero >usr/page
for i in $(seq 600); do echo "$i" >"usr/share/deep/a-file-with-a-rather-long-name-$i"; done
mkfifo pipe
echo x >gone/file
echo old >opaque/old
echo gone >etc/gone
touch -d '2001-02-03 04:05:06.789' usr/zeros
chmod 1777 tmp
if [ "$root" ]; then
    mknod null c 1 3
    mknod disk b 259 70000
    chown 5:7 usr/share
    chown -h 1234567:7 usr/link
    chmod 2750 usr/share
    setcap cap_net_raw+ep usr/big
    setfattr -n user.large -v "$(head -c 2500 /dev/zero | tr '\0' y)" etc
    setfattr -n user.small -v x etc/a
fi
cd ../..
pack one

unpack two
cd two/rootfs
rm -rf gone etc/gone opaque usr/link
mkdir opaque usr/link
echo new >opaque/new
echo y >usr/link/y
# Only the folder right above is in the layer.
echo deeper >usr/share/deep/er/x
echo t >tmp/t
cd ../..
pack two

unpack three
cd three/rootfs
mkdir gone
echo again >gone/again
rm usr/share/deep/a-file-with-a-rather-long-name-1*
cd ../..
pack three
