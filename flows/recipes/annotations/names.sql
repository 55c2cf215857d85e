-- Names of countries, and names of books of the Bible, wherever they are written: `country` and `book`.
--
-- The names are the titles of the documents, with one to four words. A word begins at a blank or a line break; marks
-- around it do not count. Some books are called after people, so `book` has Ruth and Samuel the persons, too.
--
-- saeflow annotate names flows/recipes/annotations/names.sql
with pieces as (
    select
        token_id,
        document_id,
        piece,
        regexp_matches(piece, '^\s') or coalesce(regexp_matches(lag(piece) over document, '\s$'), true) as begins
    from tokens
    where char_start is not null
    window document as (partition by document_id order by token_id)
),
numbered as (
    select *, sum(begins::int) over (partition by document_id order by token_id) as word_id
    from pieces
),
words as (
    select
        document_id,
        word_id,
        min(token_id) as token_id,
        max(token_id) as last_token_id,
        regexp_replace(string_agg(piece, '' order by token_id), '^[^\p{L}0-9]+|[^\p{L}0-9]+$', '', 'g') as word
    from numbered
    where not regexp_full_match(piece, '\s+')
    group by document_id, word_id
),
phrases as (
    select
        token_id,
        unnest([
            {text: word, last_token_id: last_token_id},
            {text: concat_ws(' ', word, lead(word, 1) over after), last_token_id: lead(last_token_id, 1) over after},
            {
                text: concat_ws(' ', word, lead(word, 1) over after, lead(word, 2) over after),
                last_token_id: lead(last_token_id, 2) over after
            },
            {
                text: concat_ws(' ', word, lead(word, 1) over after, lead(word, 2) over after, lead(word, 3) over after),
                last_token_id: lead(last_token_id, 3) over after
            }
        ], recursive := true)
    from words
    where word != ''
    window after as (partition by document_id order by word_id)
),
titles as (
    select distinct title as text, if(source = 'kjv', 'book', 'country') as class
    from documents
    where source in ('kjv', 'factbook')
)
select class, token_id, last_token_id
from phrases
join titles using (text)
where last_token_id is not null
