"""The fetch stage: one unit's rows -> the kept images and one record row per planned row.

Stage `fetch`, unit ids `<range>-<row group>` (`00000-00000`), which sort in dataset order:
    images.tar     the encoded images, plain ustar, `<uid>.<jpg|png|webp>`, in the order they came in
    rows.parquet   FETCHED rows, in plan order (order, uid)
    counts         rows (input rows), reason:ok and reason:<reason> (input rows: num_rows summed)

FETCHED columns: uid, order, url, caption, num_rows as in the plan (pipeline.plan), then
    status           string   "ok" or "dropped"
    reason           string   null when ok, else a name in pipeline.reasons
    rule, score, threshold, detail    as in the plan; detail is also the network's or the decoder's message
    http_status      int32    of the last response, null if there was none
    final_url        string   after redirects, null if there was no response
    num_redirects    int32
    size_bytes       int64    downloaded body
    sha256           string   hex, of the downloaded body
    source_format    string   of the body by content: jpeg, png, gif, webp, bmp, tiff, avif
    original_width, original_height   int32   of the body, EXIF orientation applied
    width, height    int32    of the encoded image
    image_format     string   jpg, png or webp: the member's extension
    is_animated      bool     had more than one frame; the first was taken
    grey_std         float    standard deviation of the encoded image's grey values, 0 (one colour) to 127.5
    mean_red, mean_green, mean_blue   float   0 to 255
    image_offset     int64    where the image's bytes begin in images.tar
    image_size       int64    their number
    attempts         int32    requests made, 0 for rows that were not downloaded
    seconds          float    of all attempts, without the waits between them
then the list's extra columns. All image columns are null unless status is "ok".

`attempts`, `seconds`, `detail`, `final_url` and the order of images.tar depend on the moment: keep them out of
published shards. Everything else is a function of the responses.
"""
