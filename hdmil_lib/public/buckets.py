"""Lists of the files in a public bucket."""

import xml.etree.ElementTree as ET
from urllib.parse import quote

from hdmil_lib.errors import CohortError
from hdmil_lib.public.transfer import Client, RemoteFile


def list_bucket(client: Client, base: str, prefix: str) -> dict[str, RemoteFile]:
    """List the files of a bucket whose keys begin with a prefix, by the protocol of Amazon S3.

    Args:
        client: Client that asks.
        base: Address of the bucket, with a slash at its end.
        prefix: Beginning of the keys.

    Returns:
        Files by key, in the order of the keys.

    Raises:
        CohortError: The bucket cannot be reached, or the answer is no list.
    """
    files: dict[str, RemoteFile] = {}
    params = {"list-type": "2", "prefix": prefix}
    while True:
        content = client.read(base, params)
        try:
            page = ET.fromstring(content)
            for entry in page.iterfind("{*}Contents"):
                key = _text(entry, "Key")
                etag = _text(entry, "ETag").strip('"')
                files[key] = RemoteFile(base + quote(key), int(_text(entry, "Size")), etag)
        except (ET.ParseError, ValueError) as error:
            raise CohortError(f"{base}: the answer is no list of a bucket ({error}); try again") from error
        token = page.findtext("{*}NextContinuationToken")
        if not token:
            return files
        params = {**params, "continuation-token": token}


def _text(entry: ET.Element, name: str) -> str:
    text = entry.findtext(f"{{*}}{name}")
    if text is None:
        raise ValueError(f"an entry without {name}")
    return text
