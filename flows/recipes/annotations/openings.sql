-- The first 32 tokens of each chapter of a novel or of the Bible, of each book of the Bible, and of each country.
--
-- A chapter of the Bible begins where a number stands alone at the end of a line and an empty line follows.
--
-- saeflow annotate openings flows/recipes/annotations/openings.sql
with documents_of as (
    select
        document_id,
        first_token_id,
        first_token_id + n_tokens as end_token_id,
        case source when 'austen' then 'chapter' when 'kjv' then 'book' else 'country' end as class
    from documents
    where n_tokens > 0
),
headings as (
    select
        token_id,
        document_id,
        regexp_full_match(piece, '\s?[0-9]+')
            and lead(piece, 1) over document = chr(10)
            and lead(piece, 2) over document = chr(10) as is_heading
    from tokens
    where source = 'kjv'
    window document as (partition by document_id order by token_id)
),
begun as (
    select first_token_id as token_id, end_token_id, class from documents_of
    union all
    select token_id + 3, end_token_id, 'chapter'
    from headings
    join documents_of using (document_id)
    where is_heading
)
select class, token_id, least(token_id + 32, end_token_id) as end_token_id
from begun
where token_id < end_token_id
