-- Tokens inside straight quotation marks, with the marks: `dialogue` in novels, `quoted` elsewhere.
--
-- A mark opens if a blank, a line break or nothing stands before it, and closes otherwise. A token is inside if the last
-- mark before it opens. So a paragraph that begins with a mark again, as speech over several paragraphs does, goes on.
--
-- saeflow annotate dialogue flows/recipes/annotations/dialogue.sql
with marked as (
    select
        token_id,
        document_id,
        source,
        case
            when not contains(piece, '"') then null
            when regexp_full_match(piece, '\s+"') then true
            when piece = '"' then coalesce(regexp_matches(lag(piece) over document, '\s$'), true)
            else false
        end as opens
    from tokens
    where char_start is not null
    window document as (partition by document_id order by token_id)
),
followed as (
    select *, last_value(opens ignore nulls) over (partition by document_id order by token_id) as is_inside
    from marked
)
select token_id, if(source = 'austen', 'dialogue', 'quoted') as class
from followed
where is_inside or opens is not null
