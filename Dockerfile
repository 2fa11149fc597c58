# syntax=docker/dockerfile:1
# The image of csi-dysk: driver, daemon and tool, and the filesystems' programs
# that the driver runs. docker build --tag csi-dysk .

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
# ring is partly C and assembler.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev make \
 && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cargo build --release --locked --bin csi-dysk --bin dyskd --bin dyskctl \
 && install -D --strip --target-directory=/out target/release/csi-dysk target/release/dyskd target/release/dyskctl

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="csi-dysk" \
      org.opencontainers.image.description="Azure page blobs as disks for pods"
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      ca-certificates \
      kmod \
      mount \
      util-linux \
      e2fsprogs \
      xfsprogs \
      btrfs-progs \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/cache/debconf/* /usr/share/doc/* /usr/share/man/*
COPY --from=build /out/ /usr/local/bin/
COPY deploy/image/dyskd-pod /usr/local/bin/
COPY systemd/60-dysk.rules /usr/share/dysk/
# The controller's; the node's pods ask for root by themselves.
USER 65532:65532
ENTRYPOINT ["csi-dysk"]
