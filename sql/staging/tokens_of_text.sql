-- The tokens that spell a text of any length, whatever the case.
--
-- Grain:   one row per (run of tokens that spells the text, token of the run). A run has consecutive tokens of one
--          document. Their bytes together are the text, apart from white space (blanks, tabs, line ends) in front and
--          behind; no token at either end consists of white space alone.
-- Reads:   stg_vocab, stg_tokens, token_owners, stg_vocab_blocks, block_vocab_id, begun_text, begun_letters,
--          open_letter
-- Units:   run_id is the run's first token; vocab_id is the token's own.
-- Ask it:  from tokens_of_text('Jerusalem')
create or replace macro tokens_of_text(text) as table
with recursive goal as materialized (
    select trim(lower(text::varchar), E' \t\n\r') as letters
),
entries as materialized (
    select vocab_id, byte_digits, begun_text(byte_digits) as begun, open_letter(byte_digits) as half
    from stg_vocab
),
openings as materialized (
    select
        vocab_id,
        length(begun)                                     as n_letters,
        half,
        half = '' and rtrim(begun, E' \t\n\r') = letters  as is_done
    from entries
    cross join goal
    where letters <> ''
        and begun || half <> ''
        and (starts_with(letters, begun) or (half = '' and rtrim(begun, E' \t\n\r') = letters))
),
starts as materialized (
    select token_id, vocab_id from stg_tokens where mask and vocab_id in (select vocab_id from openings)
),
owners as materialized (
    select token_id, end_token_id from token_owners((select list(token_id) from starts))
),
-- n_letters counts the letters of the text that the tokens so far spell; half is the start of the next one.
spelling as (
    select token_id as run_id, token_id, end_token_id, n_letters, half, is_done
    from starts
    join owners using (token_id)
    join openings using (vocab_id)
    union all
    select
        run_id,
        token_id,
        end_token_id,
        n_letters + length(begun) as n_letters,
        half,
        half = '' and substr(letters, n_letters + 1) = rtrim(begun, E' \t\n\r') as is_done
    from (
        select
            run_id,
            next_id                                      as token_id,
            end_token_id,
            n_letters,
            begun_letters(spelling.half || byte_digits)  as begun,
            open_letter(spelling.half || byte_digits)    as half
        from (
            select *, token_id + 1 as next_id, (token_id + 1) // 512 as block_id
            from spelling
            where not is_done and token_id + 1 < end_token_id
        ) as spelling
        join stg_vocab_blocks as blocks
            on blocks.block_id = spelling.block_id
            and next_id between first_token_id and first_token_id + n_tokens - 1
        join entries on entries.vocab_id = block_vocab_id(vocab_ids, next_id - first_token_id)
    )
    cross join goal
    where substr(letters, n_letters + 1, length(begun)) = begun
        or (half = '' and substr(letters, n_letters + 1) = rtrim(begun, E' \t\n\r'))
),
found as (
    select run_id, unnest(generate_series(run_id, token_id)) as token_id from spelling where is_done
)
select run_id, token_id, block_vocab_id(vocab_ids, token_id - first_token_id) as vocab_id
from (select *, token_id // 512 as block_id from found)
join stg_vocab_blocks using (block_id)
where token_id between first_token_id and first_token_id + n_tokens - 1;
