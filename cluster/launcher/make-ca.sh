#!/bin/sh
# Makes the certificate authority that signs each node's certificate, in ~/.ray/mcrise-tls or in the folder
# given. Whoever has ca.key can join the cluster: it stays with you and on the nodes.
set -eu
umask 077
folder="${1:-$HOME/.ray/mcrise-tls}"
mkdir -p "$folder"
if [ -e "$folder/ca.key" ]; then
    echo "$folder/ca.key is there already; remove it to make a new one" >&2
    exit 1
fi
openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj "/CN=mcrise cluster" \
    -keyout "$folder/ca.key" -out "$folder/ca.crt" 2>/dev/null
echo "$folder/ca.key and $folder/ca.crt"
