-- The tokens that stand for some characters of a document's text: joins annotations of spans with features.
--
-- Grain:   one row per token that has a character of the span, in corpus order.
-- Reads:   stg_tokens, stg_document_places, stg_vocab, stg_shape
-- Units:   the span has the characters first_char to end_char - 1 of the text, counted from 0 in Unicode code points.
--          Tokens of an earlier saeflow, which has not counted their characters, are an error.
-- Parameters: document_key text, first_char bigint, end_char bigint
-- Ask it:  which tokens write the first word of a document?  from tokens_of_span('emma', 0, 4)
create or replace macro tokens_of_span(document_key, first_char, end_char) as table
with mine as materialized (
    select stg_tokens.*, key, source
    from stg_tokens
    join stg_document_places using (document_id)
    where key = document_key::varchar and token_id between first_token_id and end_token_id - 1 and mask
),
counted as (
    select bool_or(char_start is not null) as has_some from mine
)
select token_id, vocab_id, stg_vocab.piece, mine.key, mine.source, position, char_start, char_end
from mine
join stg_vocab using (vocab_id)
cross join counted
cross join stg_shape
where case
        when not (has_some or has_offsets)
            then error('these tokens have no characters: an earlier saeflow wrote them.' || chr(10)
                || 'Write them anew: saeflow run RECIPE --set name=NEW')
        else char_start < end_char::bigint
            and char_end > first_char::bigint
            and first_char::bigint < end_char::bigint
    end
order by token_id;
