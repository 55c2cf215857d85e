-- True; an error if an earlier saeflow encoded a part of the run, because it did not count by source and position.
--
-- Grain:   scalar.
-- Reads:   src_shape
-- Units:   nothing
-- Ask it:  select every_part_counts()
create or replace macro every_part_counts() as
case
    when (select has_marginals from src_shape) then true
    else error('parts of this run are of an earlier saeflow, which did not count this: saeflow compact counts it')
end;
