# Sourced on every node before `ray start`: authentication, and TLS where it is switched on.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"
export RAY_USAGE_STATS_ENABLED=0

# EDIT: 1 switches on TLS between all processes of the cluster. Run make-ca.sh first, and uncomment the
# two lines of file_mounts that carry its files. Without it the token travels in the clear inside the
# cluster's network.
export RAY_USE_TLS="${RAY_USE_TLS:-0}"

if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    echo "expected a token in $RAY_AUTH_TOKEN_PATH; run 'mcrise token' where you run 'ray up'" >&2
    exit 1
fi
chmod 600 "$RAY_AUTH_TOKEN_PATH"

if [ "$RAY_USE_TLS" = 1 ]; then
    mcrise_tls="$HOME/mcrise-tls"
    export RAY_TLS_CA_CERT="$mcrise_tls/ca.crt"
    export RAY_TLS_SERVER_CERT="$mcrise_tls/node.crt"
    export RAY_TLS_SERVER_KEY="$mcrise_tls/node.key"
    # Each node gets a certificate for its own addresses, which are not known before it runs.
    (
        umask 077
        names="DNS:localhost,DNS:$(hostname),IP:127.0.0.1"
        for address in $(hostname -I); do
            names="$names,IP:$address"
        done
        openssl req -newkey rsa:2048 -nodes -subj "/CN=$(hostname | cut -c1-60)" \
            -keyout "$mcrise_tls/node.key" -out "$mcrise_tls/node.csr" 2>/dev/null
        printf 'subjectAltName=%s\n' "$names" >"$mcrise_tls/node.ext"
        openssl x509 -req -in "$mcrise_tls/node.csr" -days 365 -extfile "$mcrise_tls/node.ext" \
            -CA "$mcrise_tls/ca.crt" -CAkey "$mcrise_tls/ca.key" -CAcreateserial \
            -out "$mcrise_tls/node.crt" 2>/dev/null
    ) || exit 1
fi
