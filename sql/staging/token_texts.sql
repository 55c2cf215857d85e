-- The text around some tokens, for a list of token ids.
--
-- Grain:   one row per token of the list that is real and in a visible document. No token may be listed twice.
-- Reads:   token_spans, open_letter, letter_rest, lossy_text
-- Units:   before and after count tokens; the text never leaves the document. If the bytes of a letter are spread over
--          several tokens, the whole letter is part of token_text; half letters at the far edges are dropped. In
--          context, the marks « and » of the text itself become ‹ and ›.
-- Ask it:  from token_texts([0, 4711], 12, 12)
create or replace macro token_texts(ids, before, after) as table
with digits as (
    select
        centre,
        key,
        source,
        position,
        any_value(piece) filter (where token_id = centre)                                         as piece,
        coalesce(string_agg(short_digits, '' order by token_id) filter (where token_id < centre), '') as in_front,
        coalesce(string_agg(short_digits, '' order by token_id) filter (where token_id = centre), '') as middle,
        coalesce(string_agg(short_digits, '' order by token_id) filter (where token_id > centre), '') as behind,
        coalesce(sum(length(short_digits)) filter (where centre - token_id between 1 and before), 0) as n_in_front,
        coalesce(sum(length(short_digits)) filter (where token_id - centre between 1 and after), 0)  as n_behind
    -- A letter has at most four bytes, so that the token's own may begin three tokens before it.
    from token_spans(ids, greatest(before, 3), greatest(after, 3))
    group by all
),
begun as (
    select *, case when letter_rest(middle) = '' then '' else open_letter(in_front) end as lead from digits
),
finished as (
    select *, case when open_letter(lead || middle) = '' then '' else letter_rest(behind) end as rest from begun
),
parted as (
    select
        *,
        regexp_replace(
            right(left(in_front, length(in_front) - length(lead)), greatest(n_in_front - length(lead), 0)::bigint),
            '^(?:[89AB].){1,3}',
            ''
        )                                                                                           as digits_before,
        lead || middle || rest                                                                      as digits_here,
        substr(behind, length(rest) + 1, greatest(n_behind - length(rest), 0)::bigint)              as digits_after
    from finished
),
-- One call of lossy_text for all three, and materialised: planning these expressions takes longer than their work.
words as materialized (
    select
        *,
        list_transform(
            [digits_before, digits_here, left(digits_after, length(digits_after) - length(open_letter(digits_after)))],
            lambda digits: lossy_text(digits)
        ) as texts
    from parted
)
select
    centre as token_id,
    piece,
    texts[1] as text_before,
    texts[2] as token_text,
    texts[3] as text_after,
    translate(texts[1], '«»', '‹›')
        || '«' || translate(texts[2], '«»', '‹›') || '»'
        || translate(texts[3], '«»', '‹›') as context,
    key,
    source,
    position
from words;
