-- The tokens of sampled documents that are of one of two roles, or of one of two sources in a range.
--
-- Grain:   one row per token: by role an encoded one, by source any of a document's.
-- Reads:   stg_sample_places, within_documents, stg_tokens, is_encoded
-- Units:   is_a and is_b say of which; owner is the document's first token. n_encoded counts the document's encoded
--          tokens, null by role. by_role says whether a and b are roles; if not, they are sources, and since, until,
--          from_part and to_part are those of within_documents.
-- Ask it:  from within_sample('user', 'assistant', true, null, null, null, null)
create or replace macro within_sample(a, b, by_role, since, until, from_part, to_part) as table
with members as materialized (
    select
        sampled.document_id,
        sampled.first_token_id,
        sampled.end_token_id,
        sampled.n_tokens  as n_encoded,
        chosen.source = a as is_a,
        chosen.source = b as is_b
    from within_documents(case when not by_role then [a, b] end, since, until, from_part, to_part) as chosen
    join stg_sample_places as sampled using (document_id)
)
select unnest(range(first_token_id, end_token_id)) as token_id, first_token_id as owner, is_a, is_b, n_encoded
from members
where not by_role
union all
select tokens.token_id, members.first_token_id, tokens.role = a, tokens.role = b, null
from stg_tokens as tokens
join members using (document_id)
where by_role
    and tokens.mask
    and tokens.role in (a, b)
    and is_encoded(tokens.token_id, tokens.vocab_id);
