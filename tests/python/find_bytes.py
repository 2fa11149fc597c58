"""An independent witness: reads a page blob with Azure's own SDK.

find_bytes.py CONNECTION_STRING CONTAINER BLOB OFFSET PATTERN_FILE
Fails unless the pattern is in the blob at the offset, page ranges cover it,
and the VHD footer and an ext4 superblock at 32 MiB are where they belong.
"""

import sys

from azure.storage.blob import BlobClient


def main():
    connection, container, name, offset, path = sys.argv[1:]
    offset = int(offset)
    with open(path, "rb") as file:
        pattern = file.read()
    blob = BlobClient.from_connection_string(connection, container, name)
    properties = blob.get_blob_properties()
    size = properties.size
    assert properties.blob_type == "PageBlob", properties.blob_type
    assert properties.lease.state == "available", f"still {properties.lease.state}"
    assert size == 64 * 1024 * 1024 + 512, size
    found = blob.download_blob(offset=offset, length=len(pattern)).readall()
    assert found == pattern, "the bytes written through the kernel are not in the blob"
    covered = sum(
        max(0, min(r["end"] + 1, offset + len(pattern)) - max(r["start"], offset))
        for r in blob.get_page_ranges()[0]
    )
    assert covered == len(pattern), f"{covered} of {len(pattern)} bytes in page ranges"
    footer = blob.download_blob(offset=size - 512, length=512).readall()
    assert footer[:8] == b"conectix", footer[:8]
    superblock = blob.download_blob(offset=32 * 1024 * 1024 + 1024, length=1024).readall()
    assert superblock[56:58] == b"\x53\xef", "no ext4 superblock"
    print(f"{len(pattern)} bytes found at {offset} of {container}/{name} by azure-storage-blob")


if __name__ == "__main__":
    main()
