# Builds the images, one target each:
#
#   docker buildx build --platform linux/amd64,linux/arm64 --target nmi --build-arg VERSION=v1.0.0 -t REGISTRY/nmi:v1.0.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 --target mic --build-arg VERSION=v1.0.0 -t REGISTRY/mic:v1.0.0 .
#
# Both compiling and fetching of packages are done on the builder's own architecture, so nothing is emulated.

FROM --platform=$BUILDPLATFORM golang:1.26-bookworm AS source
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .

FROM source AS build-nmi
ARG TARGETARCH
ARG VERSION=dev
RUN CGO_ENABLED=0 GOOS=linux GOARCH=$TARGETARCH \
    go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /out/nmi ./cmd/nmi

FROM source AS build-mic
ARG TARGETARCH
ARG VERSION=dev
RUN CGO_ENABLED=0 GOOS=linux GOARCH=$TARGETARCH \
    go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /out/mic ./cmd/mic

# iptables needs shared libraries and extensions; the script says which and why.
FROM --platform=$BUILDPLATFORM debian:bookworm-slim AS rootfs
ARG TARGETARCH
COPY deploy/image/rootfs.sh /usr/local/bin/rootfs.sh
RUN dpkg --add-architecture "$TARGETARCH" \
    && apt-get -qq update \
    && rootfs.sh /rootfs "$TARGETARCH"

# MIC talks to the API server and to Azure: a static binary and CA certificates.
FROM scratch AS mic
COPY --from=rootfs /rootfs/etc /etc
COPY --from=rootfs /rootfs/usr/share/doc/ca-certificates /usr/share/doc/ca-certificates
COPY --from=rootfs /rootfs/var/lib/dpkg/status.d/ca-certificates /var/lib/dpkg/status.d/ca-certificates
COPY --from=build-mic /out/mic /usr/bin/mic
# The chart runs it as root where it has to read a file of the host that is root's alone.
USER 65532:65532
ENTRYPOINT ["/usr/bin/mic"]

# The last target is what is built when none is named.
FROM scratch AS nmi
COPY --from=rootfs /rootfs /
COPY --from=build-nmi /out/nmi /usr/bin/nmi
ENV PATH=/usr/sbin:/usr/bin
# Capabilities count only for root; which ones it keeps the DaemonSet says.
USER 0:0
ENTRYPOINT ["/usr/bin/nmi"]
