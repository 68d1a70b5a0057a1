# Docker's archive `layers.tar` of an image with $1 layers, on the busybox $2. Layer N adds /n/N, writes N into /top and
# adds /gone/N, which layer N+1 removes.
count=$1
mkdir -p layers/0/bin
cp "$2" layers/0/bin/busybox
for name in sh cat ls true; do ln -s busybox "layers/0/bin/$name"; done

ids= files=
for n in $(seq 0 $((count - 1))); do
    folder=layers/$n
    mkdir -p "$folder/n" "$folder/gone"
    echo "$n" >"$folder/n/$n"
    echo "$n" >"$folder/top"
    : >"$folder/gone/$n"
    [ "$n" = 0 ] || : >"$folder/gone/.wh.$((n - 1))"
    tar --sort=name --owner=0 --group=0 --mtime=@0 -C "$folder" -cf "layers/$n.tar" .
    digest=$(sha256sum <"layers/$n.tar" | cut -d' ' -f1)
    ids="$ids,\"sha256:$digest\"" files="$files,\"$n.tar\""
    rm -r "$folder"
done
cat >layers/config.json <<END
{"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
 "rootfs": {"type": "layers", "diff_ids": [${ids#,}]}}
END
cat >layers/manifest.json <<END
[{"Config": "config.json", "RepoTags": ["layers:$count"], "Layers": [${files#,}]}]
END
# The first entry tells an image's archive.
tar -C layers -cf layers.tar manifest.json config.json $(ls layers | grep tar)
rm -r layers
