# Builds the images of NMI and MIC, one target each:
#
#   docker buildx build --platform linux/amd64,linux/arm64 --target nmi --build-arg VERSION=v0.1.0 -t REGISTRY/podidentity/nmi:v0.1.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 --target mic --build-arg VERSION=v0.1.0 -t REGISTRY/podidentity/mic:v0.1.0 .
#
# The builder compiles and fetches packages on its own architecture, so nothing is emulated.
#
# The versions of base images stand here, and here alone. Both images must be of one Debian release. The versions of Go
# modules and of tools written in Go stand in go.mod, e2e/go.mod and tools/go.mod, and the versions of the client
# libraries for Node.js in e2e/clients/*/package.json.
ARG GO_IMAGE=golang:1.26-bookworm
ARG DEBIAN_IMAGE=debian:bookworm-slim

FROM --platform=$BUILDPLATFORM $GO_IMAGE AS source
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

# iptables needs shared libraries and extensions. deploy/image/rootfs.sh lists them with the reasons.
FROM --platform=$BUILDPLATFORM $DEBIAN_IMAGE AS rootfs
ARG TARGETARCH
COPY deploy/image/rootfs.sh /usr/local/bin/rootfs.sh
RUN dpkg --add-architecture "$TARGETARCH" \
    && apt-get -qq update \
    && rootfs.sh /rootfs "$TARGETARCH"

# MIC connects to the API server and to Azure: it needs a static binary and CA certificates.
FROM scratch AS mic
COPY --from=rootfs /rootfs/etc /etc
COPY --from=rootfs /rootfs/usr/share/doc/ca-certificates /usr/share/doc/ca-certificates
COPY --from=rootfs /rootfs/var/lib/dpkg/status.d/ca-certificates /var/lib/dpkg/status.d/ca-certificates
COPY --from=build-mic /out/mic /usr/bin/mic
# The chart runs MIC as root if MIC must read a file of the node that only root can read.
USER 65532:65532
ENTRYPOINT ["/usr/bin/mic"]

# The last target is the default.
FROM scratch AS nmi
COPY --from=rootfs /rootfs /
COPY --from=build-nmi /out/nmi /usr/bin/nmi
ENV PATH=/usr/sbin:/usr/bin
# NMI needs capabilities, and in Kubernetes only a container that runs as root gets those that its securityContext adds.
# The DaemonSet says which capabilities NMI keeps.
USER 0:0
ENTRYPOINT ["/usr/bin/nmi"]
