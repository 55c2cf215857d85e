-- One token and the text around it.
--
-- Grain:   one row; none if there is no such token.
-- Reads:   stg_tokens, stg_vocab, stg_documents, whole_letters
-- Units:   before and after count tokens; the text never leaves the document. A letter whose bytes are
--          spread over several tokens belongs to token_text. In context such marks as « in the text itself
--          become ‹ and ›; the other texts are as in the corpus.
-- Parameters: token bigint, before bigint = 20, after bigint = 20
-- Ask it:  what is written around token 4711?  from context(4711)
create or replace macro context(token, before := 20, after := 20) as table
with span as materialized (
    select token_id, vocab_id, document_id, position
    from stg_tokens
    where token_id between token::bigint - greatest(before, 0) and token::bigint + greatest(after, 0) and mask
),
centre as materialized (
    select token_id, vocab_id, document_id, position from span where token_id = token
),
digits as (
    select
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id < token), '') as digits_before,
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id = token), '') as token_digits,
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id > token), '') as digits_after
    from span
    join stg_vocab using (vocab_id)
    where document_id = (select document_id from centre)
),
words as (
    select whole_letters(digits_before, token_digits, digits_after) as word from digits
)
select
    token_id,
    stg_vocab.piece,
    word.text_before,
    word.token_text,
    word.text_after,
    translate(word.text_before, '«»', '‹›')
        || '«' || translate(word.token_text, '«»', '‹›') || '»'
        || translate(word.text_after, '«»', '‹›') as context,
    stg_documents.key,
    stg_documents.source,
    centre.position
from centre
cross join words
join stg_vocab using (vocab_id)
join stg_documents using (document_id);
