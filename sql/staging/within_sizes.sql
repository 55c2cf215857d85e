-- The number of encoded tokens of a range, by source: the denominator of rates.
--
-- Grain:   one row per source and way of counting; without sources, source is null or the document's.
-- Reads:   src_encoded_tokens, within_parts, within_rest, part_folder
-- Units:   n_encoded counts encoded tokens; add the rows up. The arguments are those of within_documents.
-- Ask it:  select sum(n_encoded) from within_sizes(null, null, null, 0, 3)
create or replace macro within_sizes(sources, since, until, from_part, to_part) as table
select encoded.source, sum(n_tokens)::bigint as n_encoded
from src_encoded_tokens as encoded
where (sources is null or (list_contains(sources, encoded.source) and not is_rest))
    and part_folder(filename) in (from within_parts(sources, since, until, from_part, to_part))
group by encoded.source
union all
select tokens.source, count(*) as n_encoded
from within_rest(sources, since, until, from_part, to_part) as tokens
group by tokens.source;
